"""How sure a measured share is, and how sure a difference between two systems is. Pure."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np


@dataclass(frozen=True, slots=True)
class Estimate:
    """A value with the interval that the stated confidence puts around it."""

    value: float
    low: float
    high: float

    @property
    def excludes_zero(self) -> bool:
        """Whether zero lies outside the interval."""
        return self.low > 0.0 or self.high < 0.0


def wilson_interval(num_right: int, num_items: int, confidence: float = 0.95) -> Estimate:
    """The share `num_right / num_items` with its Wilson score interval.

    Raises:
        ValueError: no items, more right than items, or a confidence outside (0, 1).
    """
    if num_items < 1 or not 0 <= num_right <= num_items:
        raise ValueError(f"{num_right} right of {num_items} items has no share")
    return wilson_of_share(num_right / num_items, num_items, confidence)


def wilson_of_share(share: float, num_items: float, confidence: float = 0.95) -> Estimate:
    """A share with its Wilson score interval, of so many independent items as it is worth.

    Raises:
        ValueError: no items, a share or a confidence outside [0, 1].
    """
    if not num_items > 0 or not 0.0 <= share <= 1.0:
        raise ValueError(f"share = {share} of {num_items} items has no interval")
    z = _normal_quantile(confidence)
    scale = 1.0 + z * z / num_items
    centre = (share + z * z / (2 * num_items)) / scale
    spread = share * (1.0 - share) / num_items + z * z / (4 * num_items * num_items)
    half = z * math.sqrt(spread) / scale
    low = 0.0 if share == 0.0 else centre - half
    high = 1.0 if share == 1.0 else centre + half
    return Estimate(share, low, high)


def paired_difference(
    first: Sequence[float],
    second: Sequence[float],
    clusters: Sequence[Hashable],
    *,
    confidence: float = 0.95,
    num_resamples: int = 4000,
    seed: int = 0,
) -> Estimate:
    """The mean of `first - second` with a percentile interval from a clustered bootstrap.

    Item number i of both sequences is the same item, answered by two systems. Items of one cluster (for
    example those that ask for the same fact) are drawn together, because they do not vary independently.

    Args:
        first: one score for each item.
        second: one score for each item.
        clusters: the cluster of each item.
        confidence: share of the resamples that the interval covers, in (0, 1).
        num_resamples: draws of as many clusters as there are, with replacement.
        seed: of the draws.

    Raises:
        ValueError: sequences of different lengths, no items, or a confidence outside (0, 1).
    """
    if not len(first) == len(second) == len(clusters) or len(first) == 0:
        raise ValueError(f"cannot pair {len(first)} with {len(second)} scores in {len(clusters)} clusters")
    _normal_quantile(confidence)
    numbers: dict[Hashable, int] = {}
    index = np.array([numbers.setdefault(cluster, len(numbers)) for cluster in clusters])
    difference = np.asarray(first, dtype=np.float64) - np.asarray(second, dtype=np.float64)
    totals = np.bincount(index, weights=difference)
    counts = np.bincount(index).astype(np.float64)
    rng = np.random.default_rng(seed)
    draws = rng.multinomial(len(numbers), np.full(len(numbers), 1.0 / len(numbers)), size=num_resamples)
    means = (draws @ totals) / (draws @ counts)
    tail = (1.0 - confidence) / 2.0
    low, high = np.quantile(means, [tail, 1.0 - tail])
    return Estimate(float(difference.mean()), float(low), float(high))


def _normal_quantile(confidence: float) -> float:
    if not 0.0 < confidence < 1.0:
        raise ValueError(f"confidence = {confidence} is not between 0 and 1")
    return NormalDist().inv_cdf(0.5 + confidence / 2.0)
