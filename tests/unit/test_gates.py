"""The gates: what they learn from labels, and that no row of logits is kept for it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fusionroute.errors import FusionRouteError, Reason
from fusionroute.router_model import Heads
from tests.tiny_models import save_tiny_model
from trainer.frozen_models import FrozenModel
from trainer.gates import _routed_states, train_gates
from trainer.gates_table import GatesTable
from trainer.rows import Labels, Row, RowSet
from trainer.run_context import RunContext, Stop, Stopped
from trainer.target_states import TargetSample, states_at_targets

TABLE = GatesTable(num_steps=150, batch_targets=64, warmup_steps=5)


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> list[FrozenModel]:
    folder = tmp_path_factory.mktemp("models")
    names = ["router", "even", "odd"]
    return [FrozenModel.load(str(save_tiny_model(folder / name, seed=seed)), name) for seed, name in enumerate(names)]


def repeated_tokens(width: int, num_rows: int = 60, length: int = 6) -> RowSet:
    """Rows of one token again and again, so that the state before a target tells which it is."""
    random = np.random.default_rng(0)
    marks = [False] + [True] * (length - 1)
    return RowSet.of(Row.of([int(token)] * length, marks) for token in random.integers(2, min(width, 18), num_rows))


def parity_labels(rows: RowSet) -> Labels:
    """Expert 0 knows the even tokens, expert 1 the odd ones."""
    gold = rows.ids[rows.supervised]
    knows = np.stack([gold % 2 == 0, gold % 2 == 1], axis=1)
    return Labels(
        np.where(knows, -0.01, -9.0).astype(np.float32), np.where(knows, gold[:, None], 0).astype(np.int32)
    )


def heads_for(router: FrozenModel, favourite: int = 0) -> Heads:
    bias = torch.zeros(2)
    bias[favourite] = 1.0
    return Heads(torch.zeros(2, router.model.config.hidden_size), bias)


def test_the_gate_learns_which_expert_knows_which_targets(models, tmp_path) -> None:
    router, *experts = models
    rows = repeated_tokens(router.record.logits_width)
    heads, metrics = train_gates(
        router, heads_for(router), rows, parity_labels(rows), TABLE, 0, RunContext(tmp_path), experts.__getitem__
    )
    states = states_at_targets(router, rows, RunContext(tmp_path), stage="test")
    assert heads.gate_weight is not None and heads.gate_bias is not None
    chosen = torch.nn.functional.linear(states, heads.gate_weight, heads.gate_bias).argmax(dim=1)
    wanted = torch.from_numpy(rows.ids[rows.supervised] % 2).long()
    assert (chosen == wanted).float().mean() > 0.95
    assert metrics["gate_loss"] < 0.3
    assert heads.layout.has_sum_gate


def test_without_experts_at_hand_the_sum_gate_is_left_out(models, tmp_path) -> None:
    router = models[0]
    rows = repeated_tokens(router.record.logits_width)
    heads, metrics = train_gates(
        router, heads_for(router), rows, parity_labels(rows), TABLE, 0, RunContext(tmp_path)
    )
    assert heads.layout.has_gate and not heads.layout.has_sum_gate
    assert "sum_gate_loss" not in metrics


def test_without_targets_there_are_no_gates(models, tmp_path) -> None:
    empty = Labels(np.empty((0, 2), np.float32), np.empty((0, 2), np.int32))
    heads, metrics = train_gates(
        models[0], heads_for(models[0]), RowSet.of([]), empty, TABLE, 0, RunContext(tmp_path)
    )
    assert not heads.layout.has_gate and metrics == {}


def test_rows_of_routed_experts_are_those_of_a_plain_forward(models, tmp_path) -> None:
    router, *experts = models
    rows = repeated_tokens(router.record.logits_width, num_rows=7)
    sample = TargetSample.draw(rows, parity_labels(rows), 10**6, seed=0)
    routes = torch.arange(len(sample)) % 2
    routed = _routed_states(routes, 2, sample, experts.__getitem__, RunContext(tmp_path))
    flat = torch.tensor([11, 3, 4, 20])
    got = routed.rows(flat)
    for place, target in enumerate(flat.tolist()):
        row, position = divmod(target, 5)
        model = experts[target % 2].model
        with torch.no_grad():
            wanted = model(torch.from_numpy(rows[row].ids.astype(np.int64))[None]).logits[0, position]
        torch.testing.assert_close(got[place], wanted[: got.shape[1]], atol=1e-5, rtol=1e-5)


def test_a_loss_that_is_not_finite_is_named(models, tmp_path) -> None:
    rows = repeated_tokens(models[0].record.logits_width)
    labels = parity_labels(rows)
    labels.gold_logprobs[:] = np.nan
    with pytest.raises(FusionRouteError, match="gates: step") as error:
        train_gates(models[0], heads_for(models[0]), rows, labels, TABLE, 0, RunContext(tmp_path))
    assert error.value.reason is Reason.LOSS_NOT_FINITE


def test_gates_stop_when_asked(models, tmp_path) -> None:
    rows = repeated_tokens(models[0].record.logits_width)
    stop = Stop()
    stop.request()
    with pytest.raises(Stopped):
        train_gates(
            models[0], heads_for(models[0]), rows, parity_labels(rows), TABLE, 0, RunContext(tmp_path, stop=stop)
        )


def test_a_sample_takes_whole_rows_up_to_the_limit_and_keeps_their_labels(models) -> None:
    rows = repeated_tokens(40, num_rows=30)
    labels = parity_labels(rows)
    sample = TargetSample.draw(rows, labels, max_targets=52, seed=3)
    assert len(sample) == 50 and len(sample.rows) == 10
    assert torch.equal(sample.gold, torch.from_numpy(sample.rows.ids[sample.rows.supervised]).long())
    assert torch.equal(sample.gold_logprobs, torch.from_numpy(parity_labels(sample.rows).gold_logprobs))
