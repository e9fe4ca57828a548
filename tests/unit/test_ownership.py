"""Who was right, by token owner."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import tensor

from fusionroute.router_model import load_checkpoint
from tests.served_stack import make_family
from trainer.frozen_models import FrozenModel
from trainer.ownership import NOBODY, measure_ownership, owners_of, table_by_owner
from trainer.rows import Row, RowSet
from trainer.run_context import RunContext, Stop, Stopped

SLOTS = ("math", "format")


def test_the_owner_is_the_surest_of_the_experts_that_would_have_written_the_token():
    logprobs = tensor([[-0.1, -0.2], [-0.3, -0.2], [-0.1, -0.2], [-0.1, -0.2]])
    right = tensor([[True, True], [True, True], [False, True], [False, False]])
    assert owners_of(logprobs, right).tolist() == [0, 1, 1, 2]


def test_the_table_counts_each_owners_targets_apart():
    table = table_by_owner(
        SLOTS,
        7,
        routes=tensor([0, 1, 1, 0]),
        expert_logprobs=tensor([[-0.1, -5.0], [-0.5, -4.0], [-6.0, -0.2], [-3.0, -7.0]]),
        experts_right=tensor([[True, False], [True, True], [False, True], [False, False]]),
        router_logprobs=tensor([-1.0, -2.0, -3.0, -0.5]),
        router_right=tensor([False, True, False, True]),
        sum_logprobs=tensor([-0.2, -0.4, -0.1, -0.9]),
        sum_right=tensor([True, False, True, True]),
    )
    math, form, nobody = table.owners
    assert [row.owner for row in table.owners] == ["math", "format", NOBODY]
    assert [row.num_targets for row in table.owners] == [2, 1, 1]
    assert math.selected == {"math": 0.5, "format": 0.5}
    assert (math.router_right, math.expert_right, math.sum_right, math.shared) == (0.5, 1.0, 0.5, 0.5)
    assert [math.router_logprob, math.expert_logprob] == pytest.approx([-1.5, -2.05])
    assert [form.expert_right, form.expert_logprob] == pytest.approx([1.0, -0.2])
    assert [nobody.expert_right, nobody.sum_right, nobody.sum_logprob] == pytest.approx([0.0, 1.0, -0.9])
    json.dumps(table.to_json(), allow_nan=False)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory):
    family = make_family(tmp_path_factory.mktemp("family"), SLOTS)
    experts = [FrozenModel.load(str(path), slot) for slot, path in family.experts.items()]
    scores = load_checkpoint(family.router).heads.to_scores()
    return FrozenModel.load(str(family.router), "router"), scores, experts


def rows() -> RowSet:
    draw = torch.Generator().manual_seed(3)
    made = []
    for length in (9, 4, 14, 9):
        ids = torch.randint(2, 61, (length,), generator=draw).tolist()
        made.append(Row.of(ids, [False, False] + [True] * (length - 2)))
    return RowSet.of(made)


def naive(models, given: RowSet) -> dict[str, list]:
    """Everything about every target from whole logits, row by row."""
    router, scores, experts = models
    found: dict[str, list] = {
        "routes": [],
        "logprobs": [],
        "right": [],
        "sum": [],
        "sum_right": [],
        "router": [],
    }
    for row in (given[index] for index in range(len(given))):
        ids = torch.from_numpy(row.ids).long()[None]
        with torch.no_grad():
            logits = [each.model(ids, use_cache=False).logits[0] for each in (router, *experts)]
            route = scores(router.hidden(ids)[0])[:, : len(experts)].argmax(1)
        for position in row.supervised.nonzero()[0] - 1:
            gold, which = int(ids[0, position + 1]), int(route[position])
            own, *others = [each[position] for each in logits]
            fused = own + others[which]
            found["routes"].append(which)
            found["router"].append(float(own.log_softmax(0)[gold]))
            found["logprobs"].append([float(each.log_softmax(0)[gold]) for each in others])
            found["right"].append([int(each.argmax()) == gold for each in others])
            found["sum"].append(float(fused.log_softmax(0)[gold]))
            found["sum_right"].append(int(fused.argmax()) == gold)
    return found


@pytest.mark.parametrize("chunk_tokens", [5, 256])
def test_in_chunks_it_equals_whole_logits(models, chunk_tokens: int, tmp_path: Path):
    given = rows()
    router, scores, experts = models
    table = measure_ownership(given, router, scores, experts, RunContext(tmp_path), chunk_tokens)
    found = naive(models, given)
    right = tensor(found["right"])
    assert len(set(found["routes"])) == 2, "the test needs both experts"
    owners = owners_of(tensor(found["logprobs"]), right)
    assert sum(row.num_targets for row in table.owners) == given.num_targets
    for index, row in enumerate(table.owners):
        own = (owners == index).nonzero()[:, 0].tolist()
        assert row.num_targets == len(own)
        if own:
            assert row.router_logprob == pytest.approx(
                sum(found["router"][i] for i in own) / len(own), rel=1e-4
            )
            chosen = [found["logprobs"][i][found["routes"][i]] for i in own]
            assert row.expert_logprob == pytest.approx(sum(chosen) / len(own), rel=1e-4)
            assert row.sum_logprob == pytest.approx(sum(found["sum"][i] for i in own) / len(own), rel=1e-4)
            assert row.sum_right == pytest.approx(sum(found["sum_right"][i] for i in own) / len(own))
            assert row.selected["format"] == pytest.approx(sum(found["routes"][i] for i in own) / len(own))


def test_no_rows_make_an_empty_table(models, tmp_path: Path):
    router, scores, experts = models
    table = measure_ownership(RowSet.of([]), router, scores, experts, RunContext(tmp_path))
    assert [row.num_targets for row in table.owners] == [0, 0, 0]


def test_a_stop_is_obeyed(models, tmp_path: Path):
    stop = Stop()
    stop.request()
    router, scores, experts = models
    with pytest.raises(Stopped):
        measure_ownership(rows(), router, scores, experts, RunContext(tmp_path, stop=stop))
