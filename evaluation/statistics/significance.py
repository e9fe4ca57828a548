"""p-values of paired differences, and what a family of them has to pay. Exact or in closed form, never drawn."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist

import numpy as np
import numpy.typing as npt

SMALLEST = 1e-300
"""No p-value is given as less, because numbers end there."""

ENUMERATED = 16
"""Up to so many clusters all ways to flip signs are tried."""

_DENOMINATORS = (1, 2, 3, 4, 5, 6, 8, 10, 12)
_LONGEST_LATTICE = 60_000
Floats = npt.NDArray[np.float64]


def mcnemar(only_first: int, only_second: int) -> float:
    """McNemar's exact test, two-sided: were both systems equally good, each question that only one of them gets
    right would be a fair coin. Not the mid-p variant.

    It takes questions for independent; `sign_flip` does not.

    Raises:
        ValueError: a negative number.
    """
    if min(only_first, only_second) < 0:
        raise ValueError(f"only_first = {only_first}, only_second = {only_second}: neither may be negative")
    return _lattice_tail(np.ones(only_first + only_second, dtype=np.int64), abs(only_first - only_second))


def sign_flip(differences: npt.ArrayLike) -> float:
    """The sign-flip test, two-sided: how often the sum would be as far from 0 if signs were fair coins.

    Under the null hypothesis nothing changes when both systems swap names, in each cluster by itself. So each
    cluster's summed difference has either sign with probability 1/2, whatever its size and however the questions
    in it hang together; given the sizes the test is exact. With one right-or-wrong question in each cluster it is
    McNemar's exact test, which is why it stands in its place.

    Sums of scores are counted exactly (all are multiples of one number), up to `ENUMERATED` other values by trying
    all flips, more by Lugannani and Rice's saddlepoint formula. Never less than `SMALLEST`.

    Args:
        differences: one number for each cluster, first minus second, summed over its questions and seeds.
    """
    values = np.asarray(differences, dtype=np.float64)
    values = values[values != 0.0]
    if values.size == 0:
        return 1.0
    lattice = _on_lattice(values)
    if lattice is not None:
        return _lattice_tail(np.abs(lattice), abs(int(lattice.sum())))
    magnitudes = np.abs(values) / np.abs(values).max()
    observed = float(abs(math.fsum(values))) / float(np.abs(values).max())
    if values.size <= ENUMERATED:
        return _enumerated_tail(magnitudes, observed)
    return _saddlepoint_tail(magnitudes, observed)


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusted by Holm, in the order given: below 0.05 at most one family in twenty holds a false finding,
    however the tests depend on each other."""
    adjusted = [1.0] * len(p_values)
    largest = 0.0
    for rank, place in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[place]))
        adjusted[place] = largest
    return adjusted


def _on_lattice(values: Floats) -> npt.NDArray[np.int64] | None:
    """The values as whole multiples of one number; None where they are none, or too many."""
    for denominator in _DENOMINATORS:
        scaled = values * denominator
        nearest = np.rint(scaled)
        if np.abs(nearest).sum() > _LONGEST_LATTICE:
            return None
        if np.allclose(scaled, nearest, rtol=0.0, atol=1e-9):
            return nearest.astype(np.int64)
    return None


def _lattice_tail(magnitudes: npt.NDArray[np.int64], observed: int) -> float:
    """P(|sum of +-magnitudes| >= observed), by convolving one binomial distribution for each magnitude."""
    if observed == 0:
        return 1.0
    total = int(magnitudes.sum())
    chances = np.ones(1)
    for magnitude, number in zip(*np.unique(magnitudes, return_counts=True), strict=True):
        kernel = np.zeros(int(magnitude) * int(number) + 1)
        kernel[:: int(magnitude)] = _fair_coins(int(number))
        chances = np.convolve(chances, kernel)
    tail = math.fsum(chances[(total + observed) // 2 :])  # of twice what was not flipped, less all
    return min(1.0, max(SMALLEST, 2.0 * tail))


def _fair_coins(number: int) -> Floats:
    """Chances of 0, 1, ... heads."""
    logs = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, number + 1)))])
    return np.asarray(np.exp(logs[-1] - logs - logs[::-1] - number * math.log(2.0)))


def _enumerated_tail(magnitudes: Floats, observed: float) -> float:
    sums = np.zeros(1)
    for magnitude in magnitudes:
        sums = np.concatenate([sums + magnitude, sums - magnitude])
    return float(np.mean(np.abs(sums) >= observed - 1e-9))


def _saddlepoint_tail(magnitudes: Floats, observed: float) -> float:
    """Lugannani and Rice (1980), with K(t) = sum of log cosh(t m); magnitudes are at most 1."""
    if observed >= magnitudes.sum() - 1e-9:
        return max(SMALLEST, 2.0 ** (1 - magnitudes.size))
    t = _saddlepoint(magnitudes, observed)
    arguments = t * magnitudes
    cumulant = float(np.sum(arguments + np.log1p(np.exp(-2.0 * arguments)) - math.log(2.0)))
    w = math.sqrt(max(0.0, 2.0 * (t * observed - cumulant)))
    u = t * math.sqrt(float(np.sum((magnitudes / np.cosh(np.minimum(arguments, 300.0))) ** 2)))
    if w < 1e-3:
        return 1.0
    density = math.exp(-0.5 * w * w) / math.sqrt(2.0 * math.pi)
    tail = NormalDist().cdf(-w) + density * (1.0 / u - 1.0 / w)
    return min(1.0, max(SMALLEST, 2.0 * tail))


def _saddlepoint(magnitudes: Floats, observed: float) -> float:
    """The t at which K'(t) is the observed sum."""

    def slope(t: float) -> float:
        return float(np.sum(magnitudes * np.tanh(t * magnitudes)))

    low, high = 0.0, 1.0
    while slope(high) < observed and high < 1e9:
        low, high = high, 2.0 * high
    for _ in range(80):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if slope(middle) < observed else (low, middle)
    return 0.5 * (low + high)
