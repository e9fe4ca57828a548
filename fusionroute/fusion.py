"""From the router's scores and the models' logits to fused scores: who takes part, and how their rows become one.

Pure functions over numpy rows; `sampling` chooses the token from what they give.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from enum import Enum

import numpy as np

from fusionroute.noise import noise_bits
from fusionroute.sampling import (
    GUMBEL_RANGE,
    NO_WEIGHTS,
    Choice,
    Row,
    Sampling,
    SeenTokens,
    adjusted,
    best_ids,
    choose,
    logprob,
    logsumexp,
    pick,
    sample_among,
    softmax,
    top_candidates,
)

__all__ = [
    "GUMBEL_RANGE",
    "ROUTER_ALONE_BELOW",
    "Choice",
    "CombineRule",
    "Decision",
    "ExpertChoice",
    "HeadLayout",
    "OnExpertUnavailable",
    "Row",
    "Sampling",
    "SeenTokens",
    "adjusted",
    "best_ids",
    "choose",
    "decide",
    "decide_all",
    "drawn_expert",
    "drawn_experts",
    "fuse",
    "logprob",
    "logsumexp",
    "needs_router",
    "next_best",
    "pick",
    "sample_among",
    "softmax",
    "softplus",
    "top_candidates",
    "without_expert",
]

ROUTER_ALONE_BELOW = 1e-4
"""`mixture` asks no expert when all experts together have less weight than this."""

_EXPERT_IDS = 2**32
"""Experts draw noise as ids from here on, which no token has."""

_UNIT_GATE = math.log(math.e - 1.0)
"""softplus of this is 1: a sum gate of zero is the plain sum."""


class CombineRule(Enum):
    """How expert scores e and router scores r become fused scores (docs/method.md)."""

    SUM = "sum"
    GATED_SUM = "gated_sum"
    MIXTURE = "mixture"
    SELECT = "select"
    ROUTE = "route"
    ROUTER = "router"
    ENSEMBLE = "ensemble"
    PROXY = "proxy"

    @property
    def asks_several(self) -> bool:
        """Whether a token takes rows of further models beside router and expert; none of them can be replaced."""
        return self in _RULES_OF_SEVERAL


class ExpertChoice(Enum):
    """Who says which expert takes part in a token."""

    ROUTED = "routed"
    RANDOM = "random"


class OnExpertUnavailable(Enum):
    """What becomes of a token while nobody serves the expert that was picked for it."""

    WAIT = "wait"
    NEXT_BEST = "next_best"
    ROUTER_ONLY = "router_only"
    FAIL = "fail"


_GATE_RULES = (CombineRule.MIXTURE, CombineRule.SELECT)
_RULES_OF_SEVERAL = (CombineRule.ENSEMBLE, CombineRule.PROXY)


@dataclass(frozen=True, slots=True)
class HeadLayout:
    """Where which score stands among the k outputs of a router's heads: routing [n], gate [n + 1], sum gate [1]."""

    num_experts: int
    has_gate: bool = False
    has_sum_gate: bool = False

    def routing(self, scores: Row) -> Row:
        """Routing scores [..., n]."""
        return scores[..., : self.num_experts]

    def gate(self, scores: Row) -> Row:
        """Gate scores [..., n + 1], the last one the router's own."""
        return scores[..., self.num_experts : 2 * self.num_experts + 1]

    def sum_gate(self, scores: Row) -> float:
        """Score of the sum gate."""
        return float(scores[-1])

    def available_rules(self, *, has_base: bool = False) -> tuple[CombineRule, ...]:
        """The rules that these heads can serve; with a base model beside the experts, `proxy` too."""
        lacking: set[CombineRule] = set() if has_base else {CombineRule.PROXY}
        if not self.has_gate:
            lacking.update(_GATE_RULES)
        if not self.has_sum_gate:
            lacking.add(CombineRule.GATED_SUM)
        return tuple(rule for rule in CombineRule if rule not in lacking)


@dataclass(frozen=True, slots=True)
class Decision:
    """Who takes part in one token.

    Attributes:
        expert: index of the expert to ask; None = no single one: the router writes this token alone, or all `others`.
        weights: routing weights [n], or gate weights [n + 1] under a gate rule; empty when nothing was routed.
        complement: factor of r in a sum; log-weights under `mixture` follow from `weights`.
        others: whose rows are needed too: all experts under `ensemble`; under `proxy` n, the base model's index.
    """

    expert: int | None
    weights: Row
    complement: float = 1.0
    others: tuple[int, ...] = ()


def drawn_expert(seed: int, position: int, num_experts: int) -> int:
    """The expert of `ExpertChoice.RANDOM` for the token at a position: each one is as likely as any other.

    It is the one whose id 2**32 + index draws most noise, so it is as much a pure function of (seed, position) as the
    choice of the token is, and independent of that.
    """
    return drawn_experts(seed, position, 1, num_experts)[0]


def drawn_experts(seed: int, position: int, num_tokens: int, num_experts: int) -> list[int]:
    """`drawn_expert` of so many positions from one on."""
    positions = np.arange(position, position + num_tokens, dtype=np.uint64)[:, None]
    ids = np.arange(_EXPERT_IDS, _EXPERT_IDS + num_experts)
    drawn: list[int] = noise_bits(seed, positions, ids).argmax(axis=1).tolist()
    return drawn


def needs_router(rule: CombineRule, given_expert: int | None) -> bool:
    """Whether a token under this rule takes a forward of the router; `given_expert` as of `decide`."""
    return not (rule is CombineRule.ENSEMBLE or (rule is CombineRule.ROUTE and given_expert is not None))


def decide(
    rule: CombineRule, layout: HeadLayout, scores: Row | None, given_expert: int | None = None
) -> Decision:
    """Who takes part in a token.

    Args:
        rule: how scores will be fused.
        layout: of `scores`.
        scores: of the router's heads [k]; may be None where no router is needed.
        given_expert: the expert to ask if any is asked, whatever the scores say: a fixed or a drawn one.
    """
    if rule is CombineRule.ROUTER:
        return Decision(None, NO_WEIGHTS)
    if rule is CombineRule.ENSEMBLE:
        return Decision(None, NO_WEIGHTS, others=tuple(range(layout.num_experts)))
    if scores is None:
        assert given_expert is not None
        return Decision(given_expert, NO_WEIGHTS)
    weights = softmax(layout.gate(scores) if rule in _GATE_RULES else layout.routing(scores))
    return _decide_by(rule, layout, scores, weights, given_expert)


def decide_all(
    rules: Sequence[CombineRule],
    layout: HeadLayout,
    scores: Row | None,
    given_experts: Sequence[Sequence[int | None]],
) -> list[list[Decision]]:
    """`decide` for several rules and T tokens: by rule, then by token. Weights are computed once for all rules.

    Args:
        scores: of the router's heads [T, k]; may be None where no rule needs a router.
        given_experts: by rule, then by token.
    """
    gate = routing = None
    if scores is not None:
        routing = softmax(layout.routing(scores))
        gate = softmax(layout.gate(scores)) if layout.has_gate else None
    found = []
    for rule, given in zip(rules, given_experts, strict=True):
        weights = gate if rule in _GATE_RULES else routing
        if scores is None or weights is None or rule in (CombineRule.ROUTER, CombineRule.ENSEMBLE):
            found.append([decide(rule, layout, None, expert) for expert in given])
        else:
            each = enumerate(given)
            found.append([_decide_by(rule, layout, scores[at], weights[at], expert) for at, expert in each])
    return found


def _decide_by(
    rule: CombineRule, layout: HeadLayout, scores: Row, weights: Row, given_expert: int | None
) -> Decision:
    if rule in _GATE_RULES:
        expert = int(np.argmax(weights[:-1])) if given_expert is None else given_expert
        alone = (
            weights[-1] > weights[expert]
            if rule is CombineRule.SELECT
            else 1.0 - weights[-1] < ROUTER_ALONE_BELOW
        )
        return Decision(None if alone else expert, weights)
    expert = int(np.argmax(weights)) if given_expert is None else given_expert
    complement = softplus(layout.sum_gate(scores) + _UNIT_GATE) if rule is CombineRule.GATED_SUM else 1.0
    others = (layout.num_experts,) if rule is CombineRule.PROXY else ()
    return Decision(expert, weights, complement, others)


def next_best(rule: CombineRule, decision: Decision, is_there: Callable[[int], bool]) -> Decision | None:
    """Who takes part in a token when the picked expert is not there: the one with the next weight.

    Under a gate rule the router competes with its own weight, and wins where no expert is there. Under the other rules
    the router has no weight: without any expert there is no decision.

    Args:
        rule, decision: from `decide`, of the picked expert.
        is_there: whether the expert of an index can be asked.
    """
    has_gate = rule in _GATE_RULES
    weights = decision.weights[:-1] if has_gate else decision.weights
    there = [index for index in range(len(weights)) if is_there(index)]
    expert = max(there, key=lambda index: float(weights[index]), default=None)
    if has_gate and (expert is None or decision.weights[-1] > weights[expert]):
        return without_expert(decision)
    return None if expert is None else replace(decision, expert=expert)


def without_expert(decision: Decision) -> Decision:
    """The same token, written by the router alone."""
    return replace(decision, expert=None)


def fuse(
    rule: CombineRule,
    decision: Decision,
    expert_row: Row | None,
    router_row: Row | None,
    other_rows: Sequence[Row] = (),
) -> Row:
    """Fused scores [V], a new array or one of the given rows unchanged.

    Args:
        rule, decision: from `decide`.
        expert_row: logits e of the chosen expert; None when it was not asked.
        router_row: logits r of the router; None when it was not run.
        other_rows: logits of `decision.others`.
    """
    if decision.others:
        return _fuse_several(rule, expert_row, router_row, other_rows)
    if expert_row is None:
        assert router_row is not None
        return router_row
    if router_row is None or rule in (CombineRule.ROUTE, CombineRule.SELECT):
        return expert_row
    if rule is CombineRule.MIXTURE:
        router_weight = float(decision.weights[-1])
        mixed = (1.0 - router_weight) * softmax(expert_row) + router_weight * softmax(router_row)
        # Below this float32 has no more room; such a token can still be forced by a bias.
        logs: Row = np.log(np.maximum(mixed, np.finfo(np.float32).tiny), dtype=np.float32)
        return logs
    if decision.complement == 1.0:
        return expert_row + router_row
    return expert_row + np.float32(decision.complement) * router_row


def _fuse_several(
    rule: CombineRule, expert_row: Row | None, router_row: Row | None, other_rows: Sequence[Row]
) -> Row:
    if rule is CombineRule.ENSEMBLE:
        total = other_rows[0].astype(np.float32)
        for row in other_rows[1:]:
            total += row
        total /= np.float32(len(other_rows))
        return total
    assert rule is CombineRule.PROXY and expert_row is not None and router_row is not None
    fused: Row = expert_row + router_row
    fused -= other_rows[0]
    return fused


def softplus(value: float) -> float:
    """log(1 + exp(value))."""
    return max(value, 0.0) + math.log1p(math.exp(-abs(value)))
