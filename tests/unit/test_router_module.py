"""The router's forward: sums of the method's losses, and who learns from what."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional

from fusionroute.errors import FusionRouteError, Reason
from tests.loop_lessons import pair_lesson, sft_lesson
from tests.tiny_models import save_tiny_model
from trainer.batches import Batch, BatchMaker
from trainer.config import CdpoLossTable, SftLossTable, TrainingTable
from trainer.frozen_models import load_experts
from trainer.loop_inputs import PairLesson
from trainer.losses import expert_loss
from trainer.router_module import LossSwitches, PartSums, RouterModule
from trainer.step_plan import Items

LM, EXPERT, CDPO = range(3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("models") / "router")


def load(folder: Path, routing=None, **table) -> RouterModule:
    torch.manual_seed(11)
    routing = routing or (torch.randn(2, 32), torch.randn(2))
    return RouterModule.load(str(folder), 2, TrainingTable(device="cpu", **table), routing).train()


def batch_of(sft_rows=(), pairs=(), lesson: PairLesson | None = None) -> Batch:
    maker = BatchMaker(sft_lesson(), lesson or pair_lesson(), 2, all_targets=False)
    items = Items(np.asarray(sft_rows, np.int64), np.asarray(pairs, np.int64))
    return maker.batch(items, maker.counts(items), step=1)


def gradients(module: RouterModule, batch: Batch, part: int | None = None) -> dict[str, Any]:
    module.zero_grad()
    parts = module(batch).parts
    (parts.sum() if part is None else parts[part]).backward()
    return {name: parameter.grad for name, parameter in module.named_parameters()}


def naive(module: RouterModule, sft_rows: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """L_LM and L_expert sums from whole logits, row by row."""
    lesson = sft_lesson()
    language, routed = torch.zeros(()), torch.zeros(())
    for index in sft_rows:
        row, first = lesson.rows[index], int(lesson.rows.target_starts[index])
        output = module.lm(
            input_ids=torch.from_numpy(row.ids[None].astype(np.int64)), output_hidden_states=True
        )
        at = np.flatnonzero(row.supervised)
        gold = torch.from_numpy(row.ids[at].astype(np.int64))
        language = language + functional.cross_entropy(output.logits[0, at - 1], gold, reduction="sum")
        flat = slice(first, first + len(at))
        choices = lesson.labels.argmax_ids[flat]
        routed = routed + expert_loss(
            module.routing(output.hidden_states[-1][0, at - 1]),
            torch.from_numpy(lesson.labels.gold_logprobs[flat]),
            torch.from_numpy((choices != choices[:, :1]).any(axis=1)),
            denominator=1.0,
        )
    return language, routed


@pytest.mark.parametrize("chunk_tokens", [3, 1024])
def test_sums_and_gradients_equal_those_of_whole_logits(folder, chunk_tokens):
    module, rows = load(folder, chunk_tokens=chunk_tokens), [4, 17, 2]
    sums = module(batch_of(rows))
    wanted = naive(module, rows)
    torch.testing.assert_close(sums.parts[:2], torch.stack(wanted), rtol=1e-5, atol=1e-4)
    assert sums.parts[CDPO] == 0
    got = gradients(module, batch_of(rows))
    module.zero_grad()
    torch.stack(naive(module, rows)).sum().backward()
    for name, parameter in module.named_parameters():
        torch.testing.assert_close(got[name], parameter.grad, rtol=1e-3, atol=1e-4)


def test_the_language_model_learns_from_the_routing_loss_too(folder):
    got = gradients(load(folder), batch_of([4, 17, 2]), EXPERT)
    assert got["routing.weight"].abs().sum() > 0
    assert got["lm.model.layers.0.self_attn.q_proj.weight"].abs().sum() > 0


def test_pairs_leave_the_routing_head_without_a_gradient(folder):
    module = load(folder)
    module.freeze_routing()
    got = gradients(module, batch_of([], [0, 3]))
    assert got["routing.weight"] is None
    assert got["routing.bias"] is None
    assert got["lm.model.embed_tokens.weight"].abs().sum() > 0


def test_a_batch_without_texts_touches_the_routing_head_times_zero(folder):
    got = gradients(load(folder), batch_of([], [0, 3]))
    assert torch.equal(got["routing.weight"], torch.zeros(2, 32))
    assert torch.equal(got["routing.bias"], torch.zeros(2))


def test_an_empty_share_gives_zeros_that_reach_every_parameter(folder):
    module = load(folder)
    sums = module(batch_of())
    assert sums.parts.tolist() == [0, 0, 0]
    got = gradients(module, batch_of())
    assert all(value is not None and value.abs().sum() == 0 for value in got.values())


def test_pairs_beside_texts_change_nothing_for_the_texts(folder):
    module = load(folder)
    alone, mixed = module(batch_of([4, 17])), module(batch_of([4, 17], [1, 2]))
    torch.testing.assert_close(alone.parts[:2], mixed.parts[:2])
    torch.testing.assert_close(mixed.parts[CDPO], module(batch_of([], [1, 2])).parts[CDPO])


def test_at_step_0_the_loss_of_pairs_is_that_of_the_bias_not_ln_2(folder):
    module = load(folder)
    lesson = pair_lesson(router=module)
    sums = module(batch_of([], [0, 1, 2], lesson)).parts.detach()
    starts = lesson.pairs.rows.target_starts
    routed = lesson.labels.gold_logprobs[np.arange(starts[-1]), lesson.phase_one_routes]
    l_exp = np.add.reduceat(routed, starts[:-1])
    bias = 0.1 * (l_exp[0::2] - l_exp[1::2])[:3]
    wanted = sum(math.log1p(math.exp(-value)) for value in bias)
    assert float(sums[CDPO]) == pytest.approx(wanted, abs=1e-4)
    assert abs(wanted - 3 * math.log(2)) > 0.05


@pytest.mark.parametrize(
    ("switch", "value"),
    [("bias_scale", 0.0), ("bias_reduction", "mean"), ("beta", 0.5), ("routes", "frozen")],
)
def test_every_switch_of_phase_two_changes_the_loss(folder, switch, value):
    module = load(folder)
    batch = batch_of([], [0, 1, 2])
    before = float(module(batch).parts[CDPO].detach())
    module.switches = LossSwitches(cdpo=CdpoLossTable(**{switch: value}))
    assert abs(float(module(batch).parts[CDPO].detach()) - before) > 1e-3


def test_the_mixture_aggregate_changes_the_routing_loss(folder):
    module, batch = load(folder), batch_of([4, 17])
    before = module(batch).parts
    module.switches = LossSwitches(sft=SftLossTable(aggregate="mixture"))
    after = module(batch).parts
    assert after[LM] == before[LM]
    assert after[EXPERT] < before[EXPERT] - 1e-3


def test_the_normalised_policy_is_the_log_softmax_of_the_summed_logits(folder, tmp_path):
    sources = {slot: str(save_tiny_model(tmp_path / slot, seed=seed)) for seed, slot in enumerate("ab", 5)}
    experts = load_experts(sources)
    module = load(folder, chunk_tokens=4)
    lesson = pair_lesson(router=module)
    cdpo = CdpoLossTable(policy="normalised", bias_scale=1.0)
    module.switches = LossSwitches(cdpo=cdpo, experts=experts)
    rows = lesson.pairs.rows
    fused = []
    for index in (2, 3):
        row, first = rows[index], int(rows.target_starts[index])
        ids = torch.from_numpy(row.ids[None].astype(np.int64))
        output = module.lm(input_ids=ids, output_hidden_states=True)
        total = torch.zeros(())
        for place, position in enumerate(np.flatnonzero(row.supervised)):
            route = int(module.routing(output.hidden_states[-1][0, position - 1]).argmax())
            theirs = experts[route].head.rows(experts[route].hidden(ids)[0])[position - 1]
            own = torch.log_softmax(output.logits[0, position - 1], 0)
            log_z = torch.logsumexp(own + torch.log_softmax(theirs, 0), 0)
            gold = row.ids[position]
            # the labels stand for the expert's own log-probability of the target
            label = float(lesson.labels.gold_logprobs[first + place, route])
            total = total + own[gold] + label - log_z
        fused.append(total - float(lesson.reference_logprobs[index]))
    wanted = -functional.logsigmoid(0.1 * (fused[0] - fused[1]))
    sums = module(batch_of([5], [1], lesson))
    torch.testing.assert_close(sums.parts[CDPO], wanted, rtol=1e-4, atol=1e-4)


def test_gradient_checkpointing_gives_the_same_gradients(folder):
    batch = batch_of([4, 17], [1])
    plain, checkpointed = load(folder), load(folder, gradient_checkpointing=True)
    entered: list[bool] = []
    checkpointed.lm.model.layers[0].self_attn.q_proj.register_forward_hook(lambda *_: entered.append(True))
    wanted, got = gradients(plain, batch), gradients(checkpointed, batch)
    assert len(entered) == 2  # once more in backward
    for name, value in wanted.items():
        torch.testing.assert_close(got[name], value, rtol=0, atol=0)


def test_bf16_computes_close_by_and_keeps_weights_and_scores_in_float32(folder):
    batch = batch_of([4, 17], [1])
    exact, rounded = load(folder), load(folder, precision="bf16")
    scores: list[torch.Tensor] = []
    rounded.routing.register_forward_hook(lambda _module, _inputs, output: scores.append(output))
    hidden: list[torch.Tensor] = []
    rounded.lm.model.layers[0].mlp.register_forward_hook(
        lambda _module, _inputs, output: hidden.append(output)
    )
    got = gradients(rounded, batch)
    assert hidden[0].dtype == torch.bfloat16
    assert scores[0].dtype == torch.float32
    assert all(value.dtype == torch.float32 for value in got.values())
    torch.testing.assert_close(rounded(batch).parts, exact(batch).parts, rtol=0.02, atol=0.1)
    assert not torch.equal(rounded(batch).parts, exact(batch).parts)


def test_statistics_count_what_was_seen(folder):
    from trainer.loop_statistics import named

    module, batch = load(folder), batch_of([4, 17], [1, 2])
    sums: PartSums = module(batch)
    metrics = named(sums.statistics.tolist(), sums.parts.tolist(), ["math", "code"])
    assert metrics["expert_share/math"] + metrics["expert_share/code"] == pytest.approx(1)
    assert 0 < metrics["routing_entropy"] < math.log(2)
    assert metrics["loss/lm"] == pytest.approx(float(sums.parts[LM].detach()) / batch.counts.targets)
    assert metrics["loss/expert"] == pytest.approx(
        float(sums.parts[EXPERT].detach()) / batch.counts.informative
    )
    assert metrics["loss/cdpo"] == pytest.approx(float(sums.parts[CDPO].detach()) / 2)
    chosen = [pair_lesson().pairs.rows[index].num_targets for index in (2, 4)]
    assert metrics["length/chosen"] == sum(chosen) / 2
    reward = metrics["rewards/chosen"] - metrics["rewards/rejected"]
    assert metrics["rewards/margins"] == pytest.approx(reward, abs=1e-4)
    assert metrics["flip_rate"] == pytest.approx(metrics_flips(module, batch))


def metrics_flips(module: RouterModule, batch: Batch) -> float:
    hidden = module.lm.model(input_ids=batch.ids).last_hidden_state.reshape(-1, 32)[batch.cells]
    routes = module.routing(hidden).argmax(1)[batch.num_sft_targets :]
    return float((routes != batch.phase_one_routes).double().mean())


def test_adapters_alone_are_trained_and_the_same_in_every_process(folder):
    first, second = load(folder, lora={"rank": 2}), load(folder, lora={"rank": 2})
    names = set(first.trainable())
    assert {"routing.weight", "routing.bias"} < names
    assert all("lora_" in name for name in names - {"routing.weight", "routing.bias"})
    for name, value in first.trainable().items():
        assert torch.equal(value, second.trainable()[name])
    got = gradients(first, batch_of([4, 17], [1]))
    assert all((got[name] is not None) == (name in names) for name in got)


def test_a_folder_that_is_no_model_is_refused_by_name(tmp_path):
    with pytest.raises(FusionRouteError, match="nothing") as caught:
        RouterModule.load(str(tmp_path / "nothing"), 2, TrainingTable())
    assert caught.value.reason is Reason.MODEL_NOT_FOUND


def test_weights_that_are_missing_are_refused_by_name(tmp_path):
    from safetensors.torch import load_file, save_file

    folder = save_tiny_model(tmp_path / "router")
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(FusionRouteError, match=r"lacks weights.*up_proj") as caught:
        RouterModule.load(str(folder), 2, TrainingTable())
    assert caught.value.reason is Reason.MODEL_BROKEN
