"""Merging: closed forms, the same bytes for the same seed, and refusals that name what does not fit."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from fusionroute.cli import main
from fusionroute.errors import FusionRouteError, InvalidRequest, ModelRejected, Reason
from tests.tiny_models import save_tiny_model, tiny_model, word_tokenizer
from trainer.merging import MergeMethod, MergeProgress, MergeSettings, merge, methods

Tensors = dict[str, torch.Tensor]
Save = Callable[..., Path]


@pytest.fixture(scope="module")
def save(tmp_path_factory: pytest.TempPathFactory) -> Save:
    folder = tmp_path_factory.mktemp("models")

    def save(
        name: str, seed: int = 0, *, shard_bytes: int | None = None, dtype=torch.float32, **changes
    ) -> Path:
        model = tiny_model("llama", seed, num_hidden_layers=1, **changes).to(dtype)
        sharding = {} if shard_bytes is None else {"max_shard_size": shard_bytes}
        model.save_pretrained(folder / name, **sharding)
        word_tokenizer(changes.get("vocab_size", 61)).save_pretrained(folder / name)
        return folder / name

    return save


@pytest.fixture(scope="module")
def base(save: Save) -> Path:
    return save("base", 0)


@pytest.fixture(scope="module")
def experts(save: Save) -> list[Path]:
    return [save(f"expert-{seed}", seed) for seed in (1, 2)]


def tensors(folder: Path) -> Tensors:
    return {
        name: value
        for file in sorted(folder.glob("*.safetensors"))
        for name, value in load_file(file).items()
    }


def same(first: Tensors, second: Tensors) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def refusal(*arguments, **named) -> FusionRouteError:
    with pytest.raises(FusionRouteError) as caught:
        merge(*arguments, **named)
    return caught.value


def test_the_average_of_equal_models_is_the_model(experts, tmp_path) -> None:
    merged = merge([experts[0]] * 3, tmp_path / "out", MergeSettings(MergeMethod.AVERAGE))
    assert same(tensors(merged), tensors(experts[0]))


def test_an_average_weighs_by_its_scales(experts, tmp_path) -> None:
    settings = MergeSettings(MergeMethod.AVERAGE, scales=(3.0, 1.0))
    merged = tensors(merge(experts, tmp_path / "out", settings))
    first, second = map(tensors, experts)
    for name, value in merged.items():
        torch.testing.assert_close(value, 0.75 * first[name] + 0.25 * second[name])


def test_task_arithmetic_at_scale_1_with_one_expert_is_the_expert(base, experts, tmp_path) -> None:
    merged = merge(experts[:1], tmp_path / "out", MergeSettings(MergeMethod.TASK), base)
    assert same(tensors(merged), tensors(experts[0]))


def test_task_arithmetic_at_scale_0_is_the_base(base, experts, tmp_path) -> None:
    merged = merge(experts, tmp_path / "out", MergeSettings(MergeMethod.TASK, scales=(0.0,)), base)
    assert same(tensors(merged), tensors(base))


def test_task_arithmetic_at_one_nth_is_the_average(base, experts, tmp_path) -> None:
    task = merge(experts, tmp_path / "task", MergeSettings(MergeMethod.TASK, scales=(0.5,)), base)
    average = merge(experts, tmp_path / "average", MergeSettings(MergeMethod.AVERAGE))
    for name, value in tensors(task).items():
        torch.testing.assert_close(value, tensors(average)[name])


def test_dare_that_drops_nothing_is_task_arithmetic(base, experts, tmp_path) -> None:
    dare = MergeSettings(MergeMethod.DARE, scales=(0.5,), drop_rate=0.0)
    merged = merge(experts, tmp_path / "dare", dare, base)
    task = merge(experts, tmp_path / "task", MergeSettings(MergeMethod.TASK, scales=(0.5,)), base)
    assert same(tensors(merged), tensors(task))


def test_dare_keeps_the_expectation_and_drops_its_share() -> None:
    base, model = torch.zeros(200_000), torch.ones(200_000)
    merged = methods.dare(base, [model], [0.5], 0.8, [methods.generator_for(1, "weight", 0)])
    assert set(merged.tolist()) == {0.0, 2.5}
    assert (merged == 0).float().mean().item() == pytest.approx(0.8, abs=0.01)
    assert merged.mean().item() == pytest.approx(0.5, abs=0.02)


def test_ties_trims_elects_and_averages_what_agrees() -> None:
    """Kept are the two largest of four; signs of the sums are +, -, -, 0."""
    base = torch.tensor([1.0, 1.0, 1.0, 1.0])
    changes = [[4.0, -1.0, 3.0, 0.5], [2.0, 0.1, -5.0, 0.0], [0.1, -6.0, 0.0, -7.0]]
    models = [base + torch.tensor(change) for change in changes]
    thresholds = [methods.trim_threshold(model - base, 0.5) for model in models]
    merged = methods.ties(base, models, [1.0, 1.0, 0.5], thresholds)
    # trimmed: [4 . 3 .], [2 . -5 .], [. -3 . -3.5]
    torch.testing.assert_close(merged, base + torch.tensor([3.0, -3.0, -5.0, -3.5]))


def test_ties_that_trims_nothing_of_one_model_is_that_model(base, experts, tmp_path) -> None:
    merged = merge(experts[:1], tmp_path / "out", MergeSettings(MergeMethod.TIES, density=1.0), base)
    assert same(tensors(merged), tensors(experts[0]))


def test_the_same_seed_gives_the_same_bytes_and_another_one_others(base, experts, tmp_path) -> None:
    folders = [
        merge(experts, tmp_path / name, MergeSettings(MergeMethod.DARE, seed=seed), base)
        for name, seed in (("a", 1), ("b", 1), ("c", 2))
    ]
    contents = [(folder / "model.safetensors").read_bytes() for folder in folders]
    assert contents[0] == contents[1] != contents[2]
    facts = [json.loads((folder / "merge.json").read_text()) for folder in folders]
    assert facts[0] == facts[1]
    assert facts[0]["weights_sha256"] != facts[2]["weights_sha256"]
    assert facts[0]["models"] == facts[2]["models"]


@pytest.mark.parametrize("method", list(MergeMethod))
def test_pieces_and_shards_give_what_whole_tensors_give(
    method, base, experts, save, tmp_path, monkeypatch
) -> None:
    settings = MergeSettings(method)
    used = base if method.needs_base else None
    whole = tensors(merge(experts, tmp_path / "whole", settings, used))
    sharded = [save("sharded-1", 1, shard_bytes=9_000), experts[1]]
    merged = merge(sharded, tmp_path / "pieces", settings, used, piece_numbers=64)
    assert len(list(merged.glob("*.safetensors"))) > 1
    assert same(tensors(merged), whole)
    loaded = AutoModelForCausalLM.from_pretrained(merged).state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in whole.items())


def test_tied_weights_stay_tied_and_16_bits_stay_16_bits(save, tmp_path) -> None:
    options = {"tie_word_embeddings": True, "dtype": torch.bfloat16}
    models = [save(f"tied-{seed}", seed, **options) for seed in (1, 2)]
    merged = merge(models, tmp_path / "out", MergeSettings(MergeMethod.AVERAGE))
    assert "lm_head.weight" not in tensors(merged)
    assert {value.dtype for value in tensors(merged).values()} == {torch.bfloat16}
    model = AutoModelForCausalLM.from_pretrained(merged)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_a_merged_model_is_a_model_folder_with_its_tokenizer(experts, tmp_path) -> None:
    told: list[MergeProgress] = []
    merged = merge(experts, tmp_path / "out", MergeSettings(MergeMethod.AVERAGE), report=told.append)
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (merged / name).read_bytes() == (experts[0] / name).read_bytes()
    numbers = sum(value.numel() for value in tensors(merged).values())
    assert (told[-1].done, told[-1].total) == (numbers, numbers)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_other_shapes_are_refused_by_tensor_and_models(experts, save, tmp_path) -> None:
    wider = save("wider", intermediate_size=64)
    error = refusal([experts[0], wider], tmp_path / "out", MergeSettings(MergeMethod.AVERAGE))
    assert error.reason is Reason.MODEL_UNSUPPORTED
    for named in (
        "model.layers.0.mlp.down_proj.weight",
        "[32, 48] and [32, 64]",
        str(experts[0]),
        str(wider),
    ):
        assert named in error.message
    assert list(tmp_path.iterdir()) == []


def test_other_vocabularies_and_architectures_are_refused(experts, save, tmp_path) -> None:
    larger = save("larger", vocab_size=70)
    error = refusal([experts[0], larger], tmp_path / "out", MergeSettings(MergeMethod.AVERAGE))
    assert error.reason is Reason.VOCABULARY_MISMATCH and "vocab_size 61 and 70" in error.message
    other = save_tiny_model(tmp_path / "qwen", "qwen3", seed=0)
    error = refusal([experts[0], other], tmp_path / "out", MergeSettings(MergeMethod.AVERAGE))
    assert "model_type 'llama' and 'qwen3'" in error.message


def test_other_meanings_of_ids_are_refused(experts, tmp_path) -> None:
    import shutil

    other = shutil.copytree(experts[1], tmp_path / "renamed")
    text = (other / "tokenizer.json").read_text().replace('"w5"', '"five"')
    (other / "tokenizer.json").write_text(text)
    error = refusal([experts[0], other], tmp_path / "out", MergeSettings(MergeMethod.AVERAGE))
    assert error.reason is Reason.VOCABULARY_MISMATCH and "tokenizer fingerprints" in error.message


def test_numbers_that_overflow_are_refused_and_leave_nothing(base, experts, tmp_path) -> None:
    error = refusal(experts, tmp_path / "out", MergeSettings(MergeMethod.TASK, scales=(1e39,)), base)
    assert error.reason is Reason.MODEL_BROKEN and "not finite" in error.message
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("drop_rate", {"method": MergeMethod.DARE, "drop_rate": 1.0}),
        ("density", {"method": MergeMethod.TIES, "density": 0.0}),
        ("scales", {"method": MergeMethod.TASK, "scales": (float("nan"),)}),
        ("scales", {"method": MergeMethod.AVERAGE, "scales": (0.0,)}),
        ("seed", {"method": MergeMethod.DARE, "seed": -1}),
    ],
)
def test_impossible_numbers_are_refused_by_name(field, values) -> None:
    with pytest.raises(InvalidRequest, match=f"^{field} = "):
        MergeSettings(**values)


def test_wishes_that_do_not_fit_are_refused(base, experts, tmp_path) -> None:
    task = MergeSettings(MergeMethod.TASK)
    assert "base = None" in refusal(experts, tmp_path / "out", task).message
    three = MergeSettings(MergeMethod.TASK, scales=(1.0, 1.0, 1.0))
    assert "1 or 2 numbers for 2 models" in refusal(experts, tmp_path / "out", three, base).message
    assert "exists already" in refusal(experts, tmp_path, task, base).message
    with pytest.raises(ModelRejected, match="does not exist"):
        merge([tmp_path / "nowhere"], tmp_path / "out", MergeSettings(MergeMethod.AVERAGE))


def test_the_command_merges_and_tells_what_it_did(base, experts, tmp_path) -> None:
    output = tmp_path / "merged"
    options = ["--method", "task", "--scale", "0.5", "--scale", "0.25", "--base", str(base), "--json"]
    command = ["models", "merge", *options, "--output", str(output), *map(str, experts)]
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout) == {
        "folder": str(output),
        **json.loads((output / "merge.json").read_text()),
    }
    wanted = MergeSettings(MergeMethod.TASK, scales=(0.5, 0.25))
    assert same(tensors(output), tensors(merge(experts, tmp_path / "out", wanted, base)))
    again = CliRunner().invoke(main, command)
    assert again.exit_code == 4 and "exists already" in again.stderr
