"""From logits to the next token: pick the expert, fuse, filter, choose. Pure functions over numpy rows.

Everything here is a pure function of its arguments, noise included: the noise of a candidate is a hash of
(seed, position, token id), so a retry, a replay or another batch gives the same token.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from enum import Enum

import numpy as np
from numpy.typing import NDArray

from fusionroute.noise import gumbel, noise_bits

Row = NDArray[np.float32]
"""One full-vocabulary vector of scores [V]."""

ROUTER_ALONE_BELOW = 1e-4
"""`mixture` asks no expert when all experts together have less weight than this."""

GUMBEL_RANGE = 41.0
"""The noise lies within 36.8 and -3.7, so a candidate that is further behind the best can never win."""

_HOPEFUL_RANGE = 8.0
"""Candidates so far behind the best, after temperature, need a noise that one in some thousands has."""

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


class OnExpertUnavailable(Enum):
    """What becomes of a token while nobody serves the expert that was picked for it."""

    WAIT = "wait"
    NEXT_BEST = "next_best"
    ROUTER_ONLY = "router_only"
    FAIL = "fail"


_GATE_RULES = (CombineRule.MIXTURE, CombineRule.SELECT)


@dataclass(frozen=True, slots=True)
class HeadLayout:
    """Where which score stands among the k outputs of a router's heads: routing [n], gate [n + 1], sum gate [1]."""

    num_experts: int
    has_gate: bool = False
    has_sum_gate: bool = False

    def routing(self, scores: Row) -> Row:
        """Routing scores [n]."""
        return scores[: self.num_experts]

    def gate(self, scores: Row) -> Row:
        """Gate scores [n + 1], the last one the router's own."""
        return scores[self.num_experts : 2 * self.num_experts + 1]

    def sum_gate(self, scores: Row) -> float:
        """Score of the sum gate."""
        return float(scores[-1])

    def available_rules(self) -> tuple[CombineRule, ...]:
        """The rules that these heads can serve."""
        lacking: set[CombineRule] = set()
        if not self.has_gate:
            lacking.update(_GATE_RULES)
        if not self.has_sum_gate:
            lacking.add(CombineRule.GATED_SUM)
        return tuple(rule for rule in CombineRule if rule not in lacking)


@dataclass(frozen=True, slots=True)
class Decision:
    """Who takes part in one token.

    Attributes:
        expert: index of the expert to ask; None = the router writes this token alone.
        weights: routing weights [n], or gate weights [n + 1] under a gate rule; empty when nothing was routed.
        complement: factor of r in a sum; log-weights under `mixture` follow from `weights`.
    """

    expert: int | None
    weights: Row
    complement: float = 1.0


def needs_router(rule: CombineRule, fixed_expert: int | None) -> bool:
    """Whether a token under this rule takes a forward of the router."""
    return not (rule is CombineRule.ROUTE and fixed_expert is not None)


def decide(
    rule: CombineRule, layout: HeadLayout, scores: Row | None, fixed_expert: int | None = None
) -> Decision:
    """Picks the expert from the scores [k] of the router's heads; `scores` may be None where no router is needed."""
    if rule is CombineRule.ROUTER:
        return Decision(None, np.empty(0, np.float32))
    if scores is None:
        assert fixed_expert is not None
        return Decision(fixed_expert, np.empty(0, np.float32))
    if rule in _GATE_RULES:
        weights = softmax(layout.gate(scores))
        expert = int(np.argmax(weights[:-1])) if fixed_expert is None else fixed_expert
        alone = (
            weights[-1] > weights[expert]
            if rule is CombineRule.SELECT
            else 1.0 - weights[-1] < ROUTER_ALONE_BELOW
        )
        return Decision(None if alone else expert, weights)
    weights = softmax(layout.routing(scores))
    expert = int(np.argmax(weights)) if fixed_expert is None else fixed_expert
    complement = softplus(layout.sum_gate(scores) + _UNIT_GATE) if rule is CombineRule.GATED_SUM else 1.0
    return Decision(expert, weights, complement)


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


def fuse(rule: CombineRule, decision: Decision, expert_row: Row | None, router_row: Row | None) -> Row:
    """Fused scores [V], a new array or one of the given rows unchanged.

    Args:
        rule, decision: from `decide`.
        expert_row: logits e of the chosen expert; None when it was not asked.
        router_row: logits r of the router; None when it was not run.
    """
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


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the next token is chosen from fused scores; the defaults are greedy.

    Attributes:
        temperature: 0 is greedy.
        top_k: keep the k best; 0 keeps all.
        top_p: keep the smallest set with this much probability.
        min_p: keep what has this share of the best one's probability.
        repetition_penalty: divides positive, multiplies negative scores of all tokens seen.
        presence_penalty, frequency_penalty: subtracted once, and per occurrence, from tokens of this answer.
        logit_bias: added to the scores of single ids.
        seed: key of the noise, 64 bits.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int = 0

    @property
    def has_penalties(self) -> bool:
        """Whether tokens seen before change the scores."""
        return self.repetition_penalty != 1.0 or self.presence_penalty != 0.0 or self.frequency_penalty != 0.0


class SeenTokens:
    """The distinct tokens of prompt and answer, kept so that a step costs one vectorised pass over them."""

    def __init__(self, prompt: Iterable[int]) -> None:
        self._index: dict[int, int] = {}
        self._ids = np.empty(64, np.int64)
        self._counts = np.empty(64, np.float32)  # occurrences in the answer
        for token in prompt:
            self._place(token)

    def add(self, token: int) -> None:
        """Counts a token of the answer."""
        place = self._place(token)
        self._counts[place] += 1

    @property
    def ids(self) -> NDArray[np.int64]:
        """Distinct ids in the order of their first occurrence."""
        return self._ids[: len(self._index)]

    @property
    def counts(self) -> Row:
        """Occurrences of each of `ids` in the answer."""
        return self._counts[: len(self._index)]

    def _place(self, token: int) -> int:
        place = self._index.get(token)
        if place is None:
            place = self._index[token] = len(self._index)
            if place == len(self._ids):
                self._ids = np.concatenate([self._ids, np.empty_like(self._ids)])
                self._counts = np.concatenate([self._counts, np.empty_like(self._counts)])
            self._ids[place], self._counts[place] = token, 0
        return place


@dataclass(frozen=True, slots=True)
class Choice:
    """The chosen token and the natural log of its probability in the fused distribution."""

    token_id: int
    logprob: float


def choose(
    fused: Row,
    sampling: Sampling,
    position: int,
    seen: SeenTokens | None = None,
    allowed: NDArray[np.bool_] | None = None,
) -> Choice:
    """Chooses the token for `position` of the session from fused scores [V]; ties go to the lowest id.

    Args:
        allowed: for each id [V] whether it may be chosen, at least one; None = all. The probability of the chosen one
            is that among all of them.
    """
    token = pick(fused, sampling, position, seen, allowed)
    return Choice(token, logprob(fused, token))


def logprob(row: Row, token: int) -> float:
    """Natural log of a token's probability under a row of logits [V]."""
    return float(row[token]) - logsumexp(row)


def pick(
    fused: Row,
    sampling: Sampling,
    position: int,
    seen: SeenTokens | None = None,
    allowed: NDArray[np.bool_] | None = None,
) -> int:
    """The id that `choose` chooses, without its probability."""
    scores = adjusted(fused, sampling, seen, allowed)
    return int(np.argmax(scores)) if sampling.temperature == 0.0 else _sample(scores, sampling, position)


def top_candidates(row: Row, count: int) -> list[Choice]:
    """The `count` best ids of a row of logits with their log-probabilities, best first, ties to the lowest id."""
    best = best_ids(row, count)
    total = logsumexp(row)
    return [Choice(int(token), float(row[token]) - total) for token in best]


def adjusted(
    fused: Row, sampling: Sampling, seen: SeenTokens | None, allowed: NDArray[np.bool_] | None = None
) -> Row:
    """Scores [V] after penalties and biases; each grows with its fused score, whatever the others are.

    Ids that are not `allowed` have minus infinity, which no penalty and no bias changes.
    """
    is_plain = not sampling.logit_bias and not (seen is not None and sampling.has_penalties)
    if allowed is None and is_plain:
        return fused
    scores: Row = fused.copy() if allowed is None else np.where(allowed, fused, np.float32(-np.inf))
    if is_plain:
        return scores
    if seen is not None and sampling.has_penalties:
        values = scores[seen.ids]
        penalty = np.float32(sampling.repetition_penalty)
        values = np.where(values > 0, values / penalty, values * penalty)
        values -= np.float32(sampling.presence_penalty) * (seen.counts > 0)
        values -= np.float32(sampling.frequency_penalty) * seen.counts
        scores[seen.ids] = values
    for token, bias in sampling.logit_bias.items():
        scores[token] += np.float32(bias)
    return scores


def _sample(scores: Row, sampling: Sampling, position: int) -> int:
    """Gumbel-max over the candidates that survive top-k, top-p and min-p, in this order."""
    if 0 < sampling.top_k < len(scores):
        ids = np.sort(best_ids(scores, sampling.top_k))
    else:
        ids = np.flatnonzero(scores >= scores.max() - GUMBEL_RANGE * sampling.temperature)
    return sample_among(ids, scores[ids], sampling, position)


def sample_among(ids: NDArray[np.int64], scores: Row, sampling: Sampling, position: int) -> int:
    """Chooses among candidates that have survived top-k: their ascending ids [n] and scores [n]."""
    scaled = scores.astype(np.float64) / sampling.temperature
    if sampling.top_p < 1.0 or sampling.min_p > 0.0:
        keep = _nucleus(scaled, sampling.top_p, sampling.min_p)
        ids, scaled = ids[keep], scaled[keep]
    return int(ids[_gumbel_argmax(scaled, sampling.seed, position, ids)])


def _gumbel_argmax(scaled: NDArray[np.float64], seed: int, position: int, ids: NDArray[np.int64]) -> int:
    """Place of the largest scaled score + noise; the first of several.

    Only a candidate with a high score, or with a high hash, can win: the rest is spared the two logarithms.
    """
    bits = noise_bits(seed, position, ids)
    hopeful = scaled >= scaled.max() - _HOPEFUL_RANGE
    best_so_far = float(np.max(scaled[hopeful] + gumbel(bits[hopeful])))
    needed = best_so_far - float(scaled.max()) + _HOPEFUL_RANGE  # noise, for one that is not hopeful
    hopeful |= bits >= np.uint64(max(0.0, math.exp(-math.exp(-needed + 1e-6)) * 2.0**52 - 2.0))
    places = np.flatnonzero(hopeful)
    return int(places[np.argmax(scaled[places] + gumbel(bits[places]))])


def _nucleus(scaled: NDArray[np.float64], top_p: float, min_p: float) -> NDArray[np.int64]:
    """Ascending places of the candidates within the nucleus and above min_p; always at least one."""
    probabilities = np.exp(scaled - scaled.max())
    count = len(scaled)
    if min_p > 0.0:
        count = int(np.count_nonzero(probabilities >= min_p))
    if top_p < 1.0:
        wanted = top_p * float(probabilities.sum())
        looked_at = 64
        while True:
            order = best_ids(scaled, looked_at)
            cumulative = np.cumsum(probabilities[order])
            if cumulative[-1] >= wanted or len(order) == len(scaled):
                break
            looked_at *= 8
        count = min(count, int(np.searchsorted(cumulative, wanted, side="left")) + 1, len(order))
    return np.sort(best_ids(scaled, max(1, count)))


def best_ids(row: NDArray[np.floating], count: int) -> NDArray[np.int64]:
    """The `count` best ids, best first; equal scores by id."""
    count = min(count, len(row))
    threshold = np.partition(row, len(row) - count)[len(row) - count]
    above = np.flatnonzero(row > threshold)
    equal = np.flatnonzero(row == threshold)[: count - len(above)]
    ids = np.concatenate([above, equal])
    return ids[np.lexsort((ids, -row[ids]))]


def softmax(scores: Row) -> Row:
    """Probabilities [n] of scores [n]."""
    weights = np.exp(scores - scores.max())
    result: Row = weights / weights.sum()
    return result


def logsumexp(row: Row) -> float:
    """log(sum(exp(row)))."""
    highest = row.max()
    return float(highest) + math.log(float(np.exp(row - highest).sum()))


def softplus(value: float) -> float:
    """log(1 + exp(value))."""
    return max(value, 0.0) + math.log1p(math.exp(-abs(value)))
