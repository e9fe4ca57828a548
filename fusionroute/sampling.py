"""From fused scores to the next token: penalties, temperature, filters, noise. Pure functions over numpy rows.

The noise of a candidate is a hash of (seed, position, token id), so a retry, a replay or another batch gives the same
token.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from fusionroute.noise import gumbel, noise_bits

Row = NDArray[np.float32]
"""One full-vocabulary vector of scores [V]."""

NO_WEIGHTS: Row = np.empty(0, np.float32)
"""Where nobody is weighed."""

GUMBEL_RANGE = 41.0
"""The noise lies within 36.8 and -3.7, so a candidate that is further behind the best can never win."""

_HOPEFUL_RANGE = 8.0
"""Candidates so far behind the best, after temperature, need a noise that one in some thousands has."""


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
    """Probabilities [..., n] of scores [..., n]."""
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    result: Row = weights / weights.sum(axis=-1, keepdims=True)
    return result


def logsumexps(rows: Row) -> list[float]:
    """`logsumexp` of each of the rows [n, V], the same bits."""
    highest = rows.max(axis=1)
    sums = np.exp(rows - highest[:, None]).sum(axis=1)
    return [high + math.log(total) for high, total in zip(highest.tolist(), sums.tolist(), strict=True)]


def logsumexp(row: Row) -> float:
    """log(sum(exp(row)))."""
    highest = row.max()
    return float(highest) + math.log(float(np.exp(row - highest).sum()))
