"""Student's t distribution of whole degrees of freedom, and the interval that a few seeds allow."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from statistics import NormalDist, fmean, stdev

from evaluation.statistics.intervals import Estimate

SERIES_LIMIT = 200
"""Degrees of freedom above which the expansion around the normal is exact to ten digits."""


def within(t: float, freedom: int) -> float:
    """P(|T| <= t) by the finite series of Abramowitz and Stegun 26.7.3 and 26.7.4.

    Raises:
        ValueError: fewer than one degree of freedom.
    """
    if freedom < 1:
        raise ValueError(f"freedom = {freedom} is not allowed: at least 1")
    angle = math.atan(abs(t) / math.sqrt(freedom))
    sine, cosine = math.sin(angle), math.cos(angle)
    if freedom == 1:
        return 2.0 * angle / math.pi
    is_odd = freedom % 2 == 1
    term = cosine if is_odd else 1.0
    total = term
    for power in range(3 if is_odd else 2, freedom, 2):
        term *= cosine * cosine * (power - 1) / power
        total += term
    return 2.0 / math.pi * (angle + sine * total) if is_odd else sine * total


@lru_cache(maxsize=4096)
def quantile(confidence: float, freedom: int) -> float:
    """The t that |T| stays below with this probability: 12.706 for 0.95 and one degree of freedom.

    Raises:
        ValueError: a confidence outside (0, 1), or fewer than one degree of freedom.
    """
    if not 0.0 < confidence < 1.0:
        raise ValueError(f"confidence = {confidence} is not between 0 and 1")
    if freedom > SERIES_LIMIT:
        return _expanded(NormalDist().inv_cdf(0.5 + confidence / 2.0), freedom)
    low, high = 0.0, 1.0
    while within(high, freedom) < confidence:
        low, high = high, 2.0 * high
    for _ in range(100):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if within(middle, freedom) < confidence else (low, middle)
    return 0.5 * (low + high)


def mean_interval(values: Sequence[float], confidence: float = 0.95) -> Estimate:
    """The mean of independent values, for example one of each training seed, with Student's interval.

    Raises:
        ValueError: fewer than two values.
    """
    if len(values) < 2:
        raise ValueError(f"{len(values)} values do not say how much they vary: at least 2")
    mean = fmean(values)
    half = quantile(confidence, len(values) - 1) * stdev(values) / math.sqrt(len(values))
    return Estimate(mean, mean - half, mean + half)


def _expanded(z: float, freedom: int) -> float:
    """The Cornish-Fisher expansion, Abramowitz and Stegun 26.7.5."""
    square = z * z
    terms = (
        z * (square + 1) / 4,
        z * ((5 * square + 16) * square + 3) / 96,
        z * (((3 * square + 19) * square + 17) * square - 15) / 384,
    )
    return z + math.fsum(term / float(freedom) ** power for power, term in enumerate(terms, 1))
