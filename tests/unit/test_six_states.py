"""Why routing alone is not enough, in six states (docs/method.md).

    (question 0) --a--> (right)     (question 1) --a--> (wrong)
                 --b--> (wrong)                  --b--> (right)

Both experts have only ever learnt to say a. Whoever chooses among them says a, and is right on half of the questions.
"""

from __future__ import annotations

from itertools import product

import numpy as np

from fusionroute.fusion import CombineRule, HeadLayout, Row, Sampling, choose, decide, fuse

RIGHT = {0: 0, 1: 1}  # question -> token: a = 0, b = 1
EXPERTS: list[Row] = [np.array([4, 0], np.float32), np.array([1, -2], np.float32)]
LAYOUT = HeadLayout(num_experts=2)


def value(rule: CombineRule, routes: tuple[int, int], complement: dict[int, Row]) -> float:
    """Share of questions answered right when `routes` names the expert for each."""
    right = 0
    for question, wanted in RIGHT.items():
        scores = np.eye(2, dtype=np.float32)[routes[question]]
        decision = decide(rule, LAYOUT, scores)
        assert decision.expert == routes[question]
        fused = fuse(rule, decision, EXPERTS[decision.expert], complement[question])
        right += choose(fused, Sampling(), question).token_id == wanted
    return right / len(RIGHT)


NO_COMPLEMENT: dict[int, Row] = {question: np.zeros(2, np.float32) for question in RIGHT}
COMPLEMENT: dict[int, Row] = {0: np.zeros(2, np.float32), 1: np.array([0, 5], np.float32)}


def test_every_way_of_routing_is_right_on_half_of_the_questions() -> None:
    for routes in product((0, 1), repeat=2):
        assert value(CombineRule.ROUTE, routes, COMPLEMENT) == 0.5
        assert value(CombineRule.SUM, routes, NO_COMPLEMENT) == 0.5


def test_with_a_complement_every_question_is_answered_whoever_is_routed_to() -> None:
    for routes in product((0, 1), repeat=2):
        assert value(CombineRule.SUM, routes, COMPLEMENT) == 1.0
