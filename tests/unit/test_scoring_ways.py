"""Tokens judged together get the bits that each of them gets alone, whatever the rule."""

from __future__ import annotations

import numpy as np
import pytest

from fusionroute.fusion import CombineRule, HeadLayout, decide_all, fuse
from router_service.asking import Answer
from router_service.scoring_ways import MOST_STACKED, Rows, fused_rows

NUM_TOKENS, NUM_EXPERTS, WIDTH = 23, 3, 65
LAYOUT = HeadLayout(NUM_EXPERTS, has_gate=True, has_sum_gate=True)


def answer(rows: np.ndarray, heads: np.ndarray | None = None) -> Answer:
    return Answer(rows.astype(np.float32), heads, epoch=1, cache="", forward_seconds=0.0)


@pytest.mark.parametrize("given", [None, 1])
@pytest.mark.parametrize("rule", list(CombineRule))
def test_rows_of_a_chunk_are_fused_as_each_alone(rule: CombineRule, given: int | None) -> None:
    assert WIDTH <= MOST_STACKED
    rng = np.random.default_rng(5)
    heads = (3 * rng.normal(size=(NUM_TOKENS, 2 * NUM_EXPERTS + 2))).astype(np.float32)
    router = answer(5 * rng.normal(size=(NUM_TOKENS, WIDTH)), heads)
    (decisions,) = decide_all([rule], LAYOUT, heads, [[given] * NUM_TOKENS])
    needed = {
        each: [
            place
            for place, decision in enumerate(decisions)
            if each == decision.expert or each in decision.others
        ]
        for each in range(NUM_EXPERTS + 1)  # the last one is the base model
    }
    experts = {each: answer(5 * rng.normal(size=(len(at), WIDTH))) for each, at in needed.items() if at}
    places = {each: {place: row for row, place in enumerate(at)} for each, at in needed.items()}
    rows = Rows([decisions], router, experts, places)
    together = fused_rows(rows, 0, rule)
    for place, decision in enumerate(decisions):

        def of(expert: int, at: int = place) -> np.ndarray:
            return experts[expert].rows[places[expert][at]]

        expert_row = None if decision.expert is None else of(decision.expert)
        others = [of(each) for each in decision.others]
        alone = fuse(rule, decision, expert_row, router.rows[place], others)
        assert together[place].tobytes() == alone.astype(np.float32).tobytes()
        assert rows.seen_by(0, place).fused(rule).tobytes() == alone.tobytes()
    if given is None and rule not in (CombineRule.ROUTER, CombineRule.ENSEMBLE):
        assert len({decision.expert for decision in decisions}) >= NUM_EXPERTS
