"""The training loop in one process."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from fusionroute.errors import FusionRouteError, Reason, TrainingFailed
from tests.loop_lessons import (
    SLOTS,
    cdpo_job,
    cdpo_run,
    losses,
    save_router,
    sft_job,
    sft_lesson,
    sft_run,
    trained_tensors,
)
from tests.tiny_models import save_tiny_model, tiny_model, word_tokenizer
from trainer.config import TrainingTable
from trainer.loop import train_loop
from trainer.loop_inputs import LoopInputs, SftLesson
from trainer.loop_log import truncate_metrics
from trainer.router_module import RouterModule
from trainer.router_trainer import PartWeights, learning_rate_share, parameter_groups
from trainer.run_context import RunContext, RunProgress, Stopped

TOLERANCE = 2e-5
"""Largest difference of parameters after six steps that the order of float32 sums may make."""


def train(folder: Path) -> dict[str, torch.Tensor]:
    train_loop(folder, RunContext(folder))
    return trained_tensors(folder)


def plain_run(folder: Path, training: dict, kind: str) -> Path:
    """Without dropout, which draws otherwise for rows that are divided otherwise."""
    if kind == "cdpo":
        return cdpo_run(folder, training)
    return sft_run(folder, training, dropout=0.0)


def stop_at(folder: Path, step: int, *, save: bool = True) -> None:
    """Runs until a step and asks for the end."""

    def report(progress: RunProgress) -> None:
        if progress.step >= step:
            context.stop.request(save=save)

    context = RunContext(folder, report)
    with pytest.raises(Stopped):
        train_loop(folder, context)


@pytest.mark.parametrize("kind", ["sft", "cdpo"])
def test_one_forward_of_eight_rows_equals_four_of_two(tmp_path, kind):
    whole = train(plain_run(tmp_path / "1x8", {"batch_rows": 8}, kind))
    parts = train(plain_run(tmp_path / "4x2", {"batch_rows": 2, "accumulation_steps": 4}, kind))
    for name, value in whole.items():
        torch.testing.assert_close(parts[name], value, rtol=0, atol=TOLERANCE)
    assert losses(tmp_path / "1x8") == pytest.approx(losses(tmp_path / "4x2"), abs=1e-4)


def test_training_lowers_the_loss_and_moves_lm_and_head(tmp_path):
    folder = sft_run(tmp_path, {"max_steps": 20, "learning_rate": 3e-3})
    trained, before = train(folder), load_file(folder / "router" / "model.safetensors")
    of_steps = losses(folder)
    assert of_steps[-1] < of_steps[0] - 0.5
    assert not torch.equal(
        trained["model.layers.0.mlp.up_proj.weight"], before["model.layers.0.mlp.up_proj.weight"]
    )
    assert trained["routing.weight"].abs().sum() > 0


def test_a_stopped_run_goes_on_as_if_nothing_had_happened(tmp_path):
    training = {"log_every_steps": 1, "max_steps": 8}
    undisturbed = train(sft_run(tmp_path / "undisturbed", training))
    folder = sft_run(tmp_path / "stopped", training)
    stop_at(folder, step=3)
    assert [path.name for path in (folder / "states").iterdir()] == ["step-4"]
    resumed = train(folder)
    assert resumed.keys() == undisturbed.keys()
    for name, value in undisturbed.items():
        assert torch.equal(resumed[name], value), name
    assert losses(folder) == losses(tmp_path / "undisturbed")
    assert losses(folder, "step") == list(range(1, 9))


def test_a_stop_without_saving_leaves_no_state(tmp_path):
    folder = sft_run(tmp_path, {"log_every_steps": 1})
    stop_at(folder, step=2, save=False)
    assert not (folder / "states").exists()
    assert not (folder / "trained").exists()


def test_a_finished_run_is_returned_at_once(tmp_path):
    folder = sft_run(tmp_path)
    first = train_loop(folder, RunContext(folder))
    (folder / "inputs" / "COMPLETE").unlink()
    assert train_loop(folder, RunContext(folder)) == first
    assert first.metrics["steps"] == 6
    assert first.metrics["loss"] == losses(folder)[-1]


def test_the_last_two_states_are_kept(tmp_path):
    folder = sft_run(tmp_path, {"save_every_steps": 1})
    train(folder)
    assert sorted(path.name for path in (folder / "states").iterdir()) == ["step-4", "step-5"]


def test_a_loss_that_is_not_finite_is_named_with_its_step_and_leaves_no_state(tmp_path):
    lesson = sft_lesson()
    labels = dataclasses.replace(lesson.labels, gold_logprobs=lesson.labels.gold_logprobs.copy())
    labels.gold_logprobs[-40:] = -np.inf
    folder = sft_run(
        tmp_path, {"batch_rows": 2, "max_steps": 12, "save_every_steps": 1}, SftLesson(lesson.rows, labels)
    )
    with pytest.raises(TrainingFailed, match=r"loss/expert is not finite at step \d+") as caught:
        train(folder)
    assert caught.value.reason is Reason.LOSS_NOT_FINITE
    step = int(caught.value.metadata["step"])
    states = sorted(path.name for path in (folder / "states").iterdir()) if step > 1 else []
    assert step > 1
    assert states[-1] == f"step-{step - 1}"
    assert not (folder / "trained").exists()


def test_pairs_alone_leave_the_routing_head_as_it_was(tmp_path):
    folder = cdpo_run(tmp_path, mixed={"sft_rows_per_pair": 0})
    trained = train(folder)
    before = load_file(folder / "router" / "routing_head.safetensors")
    assert torch.equal(trained["routing.weight"], before["routing.weight"])
    assert torch.equal(trained["routing.bias"], before["routing.bias"])
    assert losses(folder, "loss/cdpo")
    assert not losses(folder, "loss/lm")


def test_pairs_with_texts_report_all_that_is_watched(tmp_path):
    folder = cdpo_run(tmp_path, {"log_every_steps": 1, "tensorboard": True})
    train(folder)
    names = set(json.loads((folder / "metrics.jsonl").read_text().splitlines()[0]))
    assert names >= {
        "loss", "loss/lm", "loss/expert", "loss/cdpo", "expert_share/math", "expert_share/code", "routing_entropy",
        "flip_rate", "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies", "logratio/chosen",
        "logratio/rejected", "bias/mean", "bias/std", "sigmoid_neg_margin", "length/chosen", "length/rejected",
        "gradient_norm", "learning_rate", "tokens_per_second",
    }  # fmt: skip
    assert losses(folder, "flip_rate")[0] == 0
    assert losses(folder, "logratio/chosen")[0] == pytest.approx(0, abs=1e-4)
    assert list((folder / "tensorboard").glob("events.*"))


def test_the_normalised_policy_trains_with_the_experts_on_line(tmp_path):
    experts = {slot: str(save_tiny_model(tmp_path / slot, seed=seed)) for seed, slot in enumerate(SLOTS, 5)}
    plain = train(cdpo_run(tmp_path / "product", {"max_steps": 2}))
    cdpo = {"policy": "normalised"}
    other = train(cdpo_run(tmp_path / "normalised", {"max_steps": 2}, cdpo=cdpo, experts=experts))
    assert other.keys() == plain.keys()
    assert not torch.equal(other["model.norm.weight"], plain["model.norm.weight"])


def test_adapters_are_merged_into_the_result(tmp_path):
    folder = sft_run(tmp_path, {"lora": {"rank": 2}, "learning_rate": 1e-2, "save_every_steps": 3})
    trained, before = train(folder), load_file(folder / "router" / "model.safetensors")
    assert trained.keys() == before.keys() | {"routing.weight", "routing.bias"}
    change = trained["model.layers.1.mlp.up_proj.weight"] - before["model.layers.1.mlp.up_proj.weight"]
    assert torch.linalg.matrix_rank(change, atol=1e-5) == 2
    assert torch.equal(trained["lm_head.weight"], before["lm_head.weight"])
    state = load_file(next((folder / "states").glob("step-*")) / "rank-0.safetensors")
    assert not any("base_layer" in name for name in state)
    RouterModule.load(str(folder / "trained"), 2, TrainingTable())


def test_weights_are_stored_in_the_dtype_they_came_in(tmp_path):
    router = tmp_path / "router"
    tiny_model("llama", tie_word_embeddings=True).to(torch.bfloat16).save_pretrained(router)
    word_tokenizer().save_pretrained(router)
    job = sft_job(router, training={"precision": "bf16"})
    LoopInputs(job, str(router), sft_lesson()).save(tmp_path / "inputs")
    trained = train(tmp_path)
    assert trained["model.norm.weight"].dtype == torch.bfloat16
    assert trained["routing.weight"].dtype == torch.float32
    assert (
        trained.keys() - {"routing.weight", "routing.bias"} == load_file(router / "model.safetensors").keys()
    )
    assert RouterModule.load(str(tmp_path / "trained"), 2, TrainingTable()).stored_dtype == torch.bfloat16


def test_labels_of_other_experts_are_refused(tmp_path):
    lesson = sft_lesson()
    narrow = dataclasses.replace(
        lesson.labels,
        gold_logprobs=lesson.labels.gold_logprobs[:, :1],
        argmax_ids=lesson.labels.argmax_ids[:, :1],
    )
    folder = sft_run(tmp_path, lesson=SftLesson(lesson.rows, narrow))
    with pytest.raises(TrainingFailed, match="labels of sft are of 1 experts, the job has 2") as caught:
        train(folder)
    assert caught.value.reason is Reason.LABELS_STALE


def test_a_state_that_lacks_the_head_is_refused_not_filled_in(tmp_path):
    folder = sft_run(tmp_path, {"log_every_steps": 1})
    stop_at(folder, step=1)
    path = folder / "states" / "step-2" / "rank-0.safetensors"
    tensors = load_file(path)
    save_file({name: value for name, value in tensors.items() if name != "parameter/routing.weight"}, path)
    with pytest.raises(TrainingFailed, match=r"lacks parameter/routing\.weight") as caught:
        train(folder)
    assert caught.value.reason is Reason.STATE_BROKEN


def test_phase_two_needs_a_checkpoint_to_start_from(tmp_path):
    folder = cdpo_run(tmp_path)
    (save_router(folder / "router") / "COMPLETE").unlink()
    with pytest.raises(FusionRouteError, match="COMPLETE") as caught:
        train(folder)
    assert caught.value.reason is Reason.CHECKPOINT_INCOMPLETE


def test_the_learning_rate_warms_up_and_falls_to_its_final_share():
    table = TrainingTable(warmup_steps=4, final_learning_rate_share=0.2)
    shares = [learning_rate_share(step, 20, table) for step in range(21)]
    assert shares[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert shares[12] == pytest.approx(0.6)
    assert shares[20] == pytest.approx(0.2)
    assert learning_rate_share(0, 20, TrainingTable(warmup_steps=0)) == 1.0


def test_the_head_has_its_own_rate_and_vectors_are_not_decayed(tmp_path):
    folder = save_tiny_model(tmp_path / "router")
    module = RouterModule.load(str(folder), 2, TrainingTable())
    table = TrainingTable(learning_rate=1e-4, head_learning_rate_factor=3, weight_decay=0.02)
    groups = parameter_groups(module, table)
    found = {
        (round(group["lr"], 8), group["weight_decay"]): {parameter.dim() for parameter in group["params"]}
        for group in groups
    }
    assert found == {(1e-4, 0.02): {2}, (1e-4, 0.0): {1}, (3e-4, 0.02): {2}, (3e-4, 0.0): {1}}
    assert sum(len(group["params"]) for group in groups) == len(list(module.parameters()))


@pytest.mark.parametrize(
    ("sft_loss", "weights"), [("sft", (1, 0.5, 1)), ("expert", (0, 0.5, 1)), ("scaled_sft", (0.5, 0.25, 1))]
)
def test_texts_beside_pairs_weigh_as_the_switch_says(sft_loss, weights):
    job = cdpo_job(sft={"expert_weight": 0.5}, mixed={"sft_loss": sft_loss})
    assert PartWeights.of(job).as_tuple() == weights
    assert PartWeights.of(sft_job(sft={"expert_weight": 0.5})).as_tuple() == (1, 0.5, 0)


def test_metrics_after_the_resumed_step_and_torn_lines_are_cut_off(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 2}\n{"step": 4}\n{"step": 6}\n{"st')
    truncate_metrics(path, 4)
    assert path.read_text() == '{"step": 2}\n{"step": 4}\n'
    truncate_metrics(path, 0)
    assert path.read_text() == ""


def test_a_share_without_rows_is_no_trouble(tmp_path):
    folder = sft_run(tmp_path, {"batch_rows": 1, "accumulation_steps": 4, "max_steps": 2}, sft_lesson(5))
    train(folder)
    assert losses(folder, "step") == [2]
