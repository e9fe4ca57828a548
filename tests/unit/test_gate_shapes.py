"""Gates with a hidden layer, and a gate that learns with the router: stored, loaded, trained, resumed, extended."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional

from fusionroute.errors import InvalidRequest
from fusionroute.router_heads import LinearScores
from fusionroute.router_model import Heads
from tests.loop_lessons import DATA, EXPERTS, random_rows, sft_lesson, sft_run, trained_tensors
from tests.tiny_models import save_tiny_model
from tests.unit.test_extend import domain
from trainer.batches import Batch, BatchMaker
from trainer.checkpoints import load_trained
from trainer.config import CdpoJob, TrainingTable
from trainer.extend import extend_heads
from trainer.frozen_models import FrozenModel
from trainer.gate_head import GateHead, with_gate
from trainer.gates import train_gates
from trainer.gates_table import GatesTable
from trainer.loop import train_loop
from trainer.losses import gate_loss
from trainer.router_module import RouterModule
from trainer.rows import Labels
from trainer.run_context import RunContext, RunProgress, Stop, Stopped
from trainer.step_plan import Items
from trainer.target_states import states_at_targets

HIDDEN, UNITS = 32, 5
MLP = GatesTable(shape="mlp", hidden=16, num_steps=150, batch_targets=64, warmup_steps=5)
GATE_PART = 3


def deep_heads(num_experts: int = 2) -> Heads:
    torch.manual_seed(0)
    routing = (torch.randn(num_experts, HIDDEN), torch.randn(num_experts))
    gate = (torch.randn(num_experts + 1, UNITS), torch.randn(num_experts + 1))
    units = [torch.randn(*shape) for shape in ((UNITS, HIDDEN), (UNITS,), (UNITS + 1, HIDDEN), (UNITS + 1,))]
    return Heads(*routing, *gate, torch.randn(1, UNITS + 1), torch.randn(1), *units)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("models") / "router")


@pytest.fixture(scope="module")
def router(folder: Path) -> FrozenModel:
    return FrozenModel.load(str(folder), "router")


def test_scores_of_a_gate_with_a_hidden_layer_stand_where_the_layout_says() -> None:
    heads, hidden = deep_heads(), torch.randn(4, HIDDEN)
    scores, layout = heads.to_scores()(hidden), heads.layout
    assert heads.gate_hidden_weight is not None and heads.sum_gate_hidden_weight is not None
    units = functional.silu(functional.linear(hidden, heads.gate_hidden_weight, heads.gate_hidden_bias))
    gate = functional.linear(units, heads.gate_weight, heads.gate_bias)
    of_sum = functional.silu(
        functional.linear(hidden, heads.sum_gate_hidden_weight, heads.sum_gate_hidden_bias)
    )
    sum_gate = functional.linear(of_sum, heads.sum_gate_weight, heads.sum_gate_bias)
    for row in range(4):
        got = scores[row].numpy()
        routed = heads.routing_weight @ hidden[row] + heads.routing_bias
        np.testing.assert_allclose(layout.routing(got), routed, atol=1e-5)
        np.testing.assert_allclose(layout.gate(got), gate[row], atol=1e-5)
        assert layout.sum_gate(got) == pytest.approx(float(sum_gate[row]), abs=1e-5)


def test_one_gate_may_be_linear_beside_one_with_a_hidden_layer() -> None:
    deep, hidden = deep_heads(), torch.randn(3, HIDDEN)
    mixed = replace(deep, gate_weight=torch.randn(3, HIDDEN), gate_hidden_weight=None, gate_hidden_bias=None)
    scores = mixed.to_scores()(hidden)
    torch.testing.assert_close(scores[:, 2:5], functional.linear(hidden, mixed.gate_weight, mixed.gate_bias))
    torch.testing.assert_close(scores[:, 5:], deep.to_scores()(hidden)[:, 5:])


def test_linear_heads_stay_one_matrix() -> None:
    deep = deep_heads()
    linear = Heads(deep.routing_weight, deep.routing_bias, torch.randn(3, HIDDEN), torch.zeros(3))
    assert isinstance(linear.to_scores(), LinearScores)


def test_tensors_of_a_hidden_layer_come_back_as_they_went_out() -> None:
    tensors = deep_heads().tensors()
    assert tensors.keys() >= {"gate_hidden.weight", "sum_gate_hidden.bias"}
    again = Heads.from_tensors(tensors, 2, HIDDEN).tensors()
    assert again.keys() == tensors.keys() and all(torch.equal(again[name], tensors[name]) for name in tensors)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda t: t.pop("gate_hidden.bias"), "gate_hidden.bias is missing"),
        (lambda t: t.pop("gate.weight"), "gate.weight is missing"),
        (
            lambda t: t.update({"gate.weight": torch.zeros(3, HIDDEN)}),
            "gate.weight has shape (3, 32), expected (3, 5)",
        ),
        (lambda t: t.update({"gate_hidden.weight": torch.zeros(UNITS, 7)}), "expected (5, 32)"),
        (
            lambda t: t.update({"routing_hidden.weight": torch.zeros(1)}),
            "unknown tensors routing_hidden.weight",
        ),
    ],
)
def test_a_hidden_layer_that_does_not_fit_is_refused_by_its_name(change, named) -> None:  # type: ignore[no-untyped-def]
    tensors = deep_heads().tensors()
    change(tensors)
    with pytest.raises(ValueError, match=named.replace("(", r"\(").replace(")", r"\)")):
        Heads.from_tensors(tensors, 2, HIDDEN)


def test_a_gate_says_zero_until_it_is_trained_and_its_hidden_layer_is_of_its_seed() -> None:
    gates = [GateHead(HIDDEN, 3, MLP, seed) for seed in (4, 4, 5)]
    assert torch.equal(gates[0](torch.randn(6, HIDDEN)), torch.zeros(6, 3))
    weights = [gate.hidden.weight for gate in gates if gate.hidden is not None]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


def test_a_gate_with_a_hidden_layer_learns_what_no_linear_one_can(router, tmp_path) -> None:
    """Which of two experts knows a token is an exclusive or of two of its state's signs."""
    rows = random_rows(300, seed=3)
    states = states_at_targets(router, rows, RunContext(tmp_path), stage="test")
    centred = states - states.median(dim=0).values
    wanted = ((centred[:, 0] > 0) ^ (centred[:, 1] > 0)).long()
    opinions = np.where(np.arange(2) == wanted.numpy()[:, None], -0.01, -9.0).astype(np.float32)
    labels = Labels(opinions, np.zeros_like(opinions, np.int32))
    routing = Heads(torch.zeros(2, HIDDEN), torch.zeros(2))
    right = {}
    for shape in ("linear", "mlp"):
        table = MLP.model_copy(update={"shape": shape, "num_steps": 300})
        heads, _ = train_gates(router, routing, rows, labels, table, 0, RunContext(tmp_path))
        chosen = heads.to_scores()(states)[:, 2:].argmax(dim=1)
        right[shape] = float((chosen == wanted).float().mean())
    assert right["mlp"] > 0.85 and right["linear"] < 0.7, right


def joint_module(folder: Path, **gates: object) -> RouterModule:
    table = GatesTable.model_validate({"reaches_router": True, **gates})
    return RouterModule.load(str(folder), 2, TrainingTable(device="cpu"), gates=table).train()


def batch() -> Batch:
    maker = BatchMaker(sft_lesson(), None, 2, all_targets=False)
    items = Items(np.arange(4), np.empty(0, np.int64))
    return maker.batch(items, maker.counts(items), step=1)


@pytest.mark.parametrize("shape", ["linear", "mlp"])
def test_the_gradient_of_a_reaching_gate_reaches_the_router(folder, shape) -> None:
    module = joint_module(folder, shape=shape)
    assert module.gate is not None
    torch.nn.init.normal_(module.gate.output.weight)
    module(batch()).parts[GATE_PART].backward()
    gradients = {name: parameter.grad for name, parameter in module.named_parameters()}
    for name in ("routing.weight", "routing.bias", "lm.lm_head.weight"):
        gradient = gradients[name]
        assert gradient is None or not gradient.any(), name
    for name in ("gate.output.weight", "lm.model.norm.weight", "lm.model.layers.0.mlp.up_proj.weight"):
        gradient = gradients[name]
        assert gradient is not None and gradient.abs().max() > 0


def test_the_sum_of_a_reaching_gate_is_the_gate_loss_of_its_scores(folder) -> None:
    module, given = joint_module(folder), batch()
    assert module.gate is not None
    torch.nn.init.normal_(module.gate.output.weight)
    hidden = module.lm.model(input_ids=given.ids).last_hidden_state.reshape(-1, HIDDEN)[given.cells]
    gold = torch.log_softmax(module.lm.lm_head(hidden), dim=1)[torch.arange(len(given.gold)), given.gold]
    every = torch.ones(len(gold), dtype=torch.bool)
    wanted = gate_loss(module.gate(hidden), given.gold_logprobs, gold, every, denominator=1.0)
    torch.testing.assert_close(module(given).parts[GATE_PART], wanted, rtol=1e-4, atol=1e-4)


def test_a_gate_fitted_afterwards_is_no_part_of_the_routers_loss_and_gives_it_no_gradient(folder) -> None:
    module = RouterModule.load(str(folder), 2, TrainingTable(device="cpu"), gates=GatesTable())
    assert module.gate is None and len(module(batch()).parts) == GATE_PART
    router, gate = FrozenModel.load(str(folder), "router"), GateHead(HIDDEN, 3, MLP, 0)
    hidden = router.hidden(batch().ids)[0]
    gate_loss(
        gate(hidden), -torch.rand(len(hidden), 2), -torch.rand(len(hidden)), torch.ones(len(hidden)).bool()
    ).backward()
    assert gate.output.weight.grad is not None
    assert all(parameter.grad is None for parameter in router.model.parameters())


JOINT = {"gates": {"reaches_router": True, "shape": "mlp", "hidden": UNITS}}


def test_a_stopped_run_with_a_reaching_gate_ends_with_the_bytes_of_an_undisturbed_one(tmp_path) -> None:
    training = {"log_every_steps": 1}
    whole, stopped = (sft_run(tmp_path / name, training, **JOINT) for name in ("whole", "stopped"))
    train_loop(whole, RunContext(whole))
    stop = Stop()

    def request(progress: RunProgress) -> None:
        if progress.step == 3:
            stop.request()

    with pytest.raises(Stopped):
        train_loop(stopped, RunContext(stopped, request, stop))
    train_loop(stopped, RunContext(stopped))
    wanted, got = trained_tensors(whole), trained_tensors(stopped)
    assert wanted.keys() >= {"gate.weight", "gate_hidden.weight"}
    assert wanted["gate.weight"].abs().max() > 0
    assert all(torch.equal(wanted[name], got[name]) for name in wanted)


def test_a_gate_that_has_learnt_with_the_router_is_kept_and_only_the_sum_gate_is_fitted(tmp_path) -> None:
    run = sft_run(tmp_path / "run", **JOINT)
    train_loop(run, RunContext(run))
    assert '"loss/gate"' in (run / "metrics.jsonl").read_text()
    router, heads = load_trained(run, "cpu")
    lesson, table = sft_lesson(), GatesTable(num_steps=5, **JOINT["gates"])
    fitted, metrics = train_gates(
        router, heads, lesson.rows, lesson.labels, table, 0, RunContext(tmp_path), lambda _: router
    )
    assert fitted.gate_weight is heads.gate_weight and fitted.gate_weight is not None
    assert fitted.sum_gate_hidden_weight is not None and metrics.keys() == {"sum_gate_loss"}


def test_phase_two_refuses_a_gate_that_would_learn_with_it() -> None:
    values = {
        "experts": EXPERTS,
        "data": DATA,
        "pairs": DATA,
        "router": "r",
        "gates": {"reaches_router": True},
    }
    with pytest.raises(InvalidRequest, match=r"gates = .*reaches_router.* should be false"):
        CdpoJob.from_values(values)


def test_a_later_expert_gets_its_row_beside_those_of_a_hidden_layer(router, tmp_path) -> None:
    new = domain(router, range(2, 10), 2, tmp_path)
    gate = GateHead(HIDDEN, 3, MLP, 0)
    before = with_gate(
        Heads(torch.zeros(2, HIDDEN), torch.tensor([0.0, 9.0])), "gate", dict(gate.named_parameters())
    )
    after, _ = extend_heads(before, new, None, MLP, 0, RunContext(tmp_path))
    assert after.gate_weight is not None and before.gate_weight is not None
    assert torch.equal(after.gate_weight[[0, 1, 3]], before.gate_weight)
    assert after.gate_hidden_weight is before.gate_hidden_weight
    chosen = Heads.from_tensors(after.tensors(), 3, HIDDEN).to_scores()(new.hidden)[:, 3:].argmax(dim=1)
    assert (chosen == 2).float().mean() > 0.95
