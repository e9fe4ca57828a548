"""A later expert: its rows are learnt, all others stay, and the effect on old targets is told."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fusionroute.router_model import Heads
from tests.tiny_models import save_tiny_model
from trainer.extend import Domain, effect_note, extend_heads
from trainer.frozen_models import FrozenModel
from trainer.gates_table import GatesTable
from trainer.rows import Labels, Row, RowSet
from trainer.run_context import RunContext

TABLE = GatesTable(num_steps=200, batch_targets=64, warmup_steps=5)


@pytest.fixture(scope="module")
def router(tmp_path_factory) -> FrozenModel:
    return FrozenModel.load(str(save_tiny_model(tmp_path_factory.mktemp("router"))), "router")


def domain(router: FrozenModel, tokens: range, knows: int, tmp_path) -> Domain:
    """Rows of one repeated token each; of three experts only `knows` is right about them."""
    rows = RowSet.of(Row.of([token] * 6, [False] + [True] * 5) for token in tokens for _ in range(4))
    gold = rows.ids[rows.supervised]
    opinions = np.full((len(gold), 3), -8.0, np.float32)
    opinions[:, knows] = -0.01
    argmax_ids = np.zeros((len(gold), 3), np.int32)
    argmax_ids[:, knows] = gold
    context = RunContext(tmp_path)
    return Domain.of(router, rows, Labels(opinions, argmax_ids), 10**6, 0, context, "test")


def old_heads(router: FrozenModel, with_gate: bool) -> Heads:
    """Two experts, the second preferred everywhere, and by far: trained rows are."""
    hidden_size = router.model.config.hidden_size
    torch.manual_seed(0)
    routing = 0.01 * torch.randn(2, hidden_size), torch.tensor([0.0, 9.0])
    gate = (0.01 * torch.randn(3, hidden_size), torch.tensor([0.0, 9.0, 0.0])) if with_gate else (None, None)
    return Heads(*routing, gate_weight=gate[0], gate_bias=gate[1])


def test_the_new_row_wins_its_own_targets_and_leaves_the_replayed_old_ones(router, tmp_path) -> None:
    new, old = domain(router, range(2, 10), 2, tmp_path), domain(router, range(10, 18), 1, tmp_path)
    heads, report = extend_heads(old_heads(router, False), new, old, TABLE, 0, RunContext(tmp_path))
    assert report["new/routed_to_new"] > 0.95 and report["old/routed_to_new"] < 0.05
    assert report["new/expert_right_before"] == 0.0 and report["new/expert_right_after"] > 0.95
    assert report["old/expert_right_after"] > 0.95
    assert report["new/expert_loss_after"] < report["new/expert_loss_before"]
    assert heads.routing_weight.shape[0] == 3
    note = effect_note(report, "late")
    assert "new domain: routed expert right 0.000 -> " in note and "old domain" in note and "WARNING" not in note


@pytest.mark.parametrize("with_gate", [True, False])
def test_all_rows_but_the_new_ones_keep_their_bytes(router, tmp_path, with_gate) -> None:
    before = old_heads(router, with_gate)
    new = domain(router, range(2, 10), 2, tmp_path)
    after, _ = extend_heads(before, new, None, TABLE, 0, RunContext(tmp_path))
    assert torch.equal(after.routing_weight[:2], before.routing_weight)
    assert torch.equal(after.routing_bias[:2], before.routing_bias)
    assert not torch.equal(after.routing_weight[2], torch.zeros_like(after.routing_weight[2]))
    if not with_gate:
        assert after.gate_weight is None
        return
    assert after.gate_weight is not None and before.gate_weight is not None
    assert torch.equal(after.gate_weight[[0, 1, 3]], before.gate_weight)
    states = new.hidden
    chosen = torch.nn.functional.linear(states, after.gate_weight, after.gate_bias).argmax(dim=1)
    assert (chosen == 2).float().mean() > 0.95


def test_without_replay_the_old_targets_may_go_to_the_new_expert_and_the_report_says_so(router, tmp_path) -> None:
    """Learning from new targets alone cannot know where the new expert is wrong."""
    new, old = domain(router, range(2, 10), 2, tmp_path), domain(router, range(10, 18), 1, tmp_path)
    alone, report = extend_heads(old_heads(router, False), new, None, TABLE, 0, RunContext(tmp_path))
    assert not any(name.startswith("old/") for name in report)
    assert "WARNING" in effect_note(report, "late")
    replayed, _ = extend_heads(old_heads(router, False), new, old, TABLE, 0, RunContext(tmp_path))

    def share_of_old_targets_lost(heads: Heads) -> float:
        scores = torch.nn.functional.linear(old.hidden, heads.routing_weight, heads.routing_bias)
        return float((scores.argmax(dim=1) == 2).float().mean())

    assert share_of_old_targets_lost(alone) > share_of_old_targets_lost(replayed)


def test_experts_that_never_disagree_teach_nothing(router, tmp_path) -> None:
    rows = RowSet.of([Row.of([5, 5, 5], [False, True, True])])
    labels = Labels(np.full((2, 3), -1.0, np.float32), np.full((2, 3), 7, np.int32))
    new = Domain.of(router, rows, labels, 100, 0, RunContext(tmp_path), "test")
    heads, report = extend_heads(old_heads(router, False), new, None, TABLE, 0, RunContext(tmp_path))
    assert report["informative_targets"] == 0
    assert torch.equal(heads.routing_weight[2], torch.zeros(heads.routing_weight.shape[1]))
