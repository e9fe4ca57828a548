"""What a number of questions can show at all: design effects and the smallest detectable difference."""

from __future__ import annotations

import math
from functools import lru_cache
from statistics import NormalDist

import numpy as np
import numpy.typing as npt

LEAST_CLUSTERS = 6
"""Fewer clusters can never be significant: five that all speak for one system have p = 2 / 2^5 = 0.0625."""

LEVEL = 0.05
POWER = 0.80


def design_effect(amounts: npt.NDArray[np.float64], sizes: npt.NDArray[np.float64]) -> float:
    """How many times more a mean of right and wrong answers varies because questions come in clusters, at least 1.

    The variance from whole clusters (linearised, Kish) over that of as many independent questions.

    Args:
        amounts: right answers of each cluster.
        sizes: questions of each cluster; neither all nor none of them are right.
    """
    num_clusters, num_questions = len(sizes), float(sizes.sum())
    share = float(amounts.sum()) / num_questions
    off = amounts - share * sizes
    clustered = num_clusters / (num_clusters - 1) * float(off @ off) / num_questions**2
    return max(1.0, clustered / (share * (1.0 - share) / (num_questions - 1.0)))


def detectable_difference(parts: npt.NDArray[np.float64], *, is_score: bool) -> float:
    """The smallest true difference that would be significant in four of five repetitions.

        (z(0.975) + z(0.8)) sqrt(sum of parts^2)

    The root is the standard deviation of the difference if the systems were equally good, as the sign-flip test has
    it: with one question in each cluster sqrt(questions answered differently) / questions, with larger ones that
    times the root of the design effect. Where (almost) nothing was answered differently that would be (almost)
    nothing; but the test needs six clusters that differ, so no score is better than that would allow.

    Args:
        parts: [K], what each cluster adds to the difference.
        is_score: whether a cluster can speak for one system at most with its own share of the questions.

    Returns:
        In units of the difference; infinity where there are too few clusters for any.
    """
    if len(parts) < LEAST_CLUSTERS:
        return math.inf
    normal = NormalDist()
    factor = normal.inv_cdf(1.0 - LEVEL / 2.0) + normal.inv_cdf(POWER)
    smallest = factor * math.sqrt(float(parts @ parts))
    return max(smallest, _share_for_enough(len(parts))) if is_score else smallest


@lru_cache(maxsize=1024)
def _share_for_enough(num_clusters: int) -> float:
    """With what chance each cluster must speak for the better system so that enough do, with the power wanted."""

    def chance(share: float) -> float:
        fewer = (
            math.comb(num_clusters, number) * share**number * (1.0 - share) ** (num_clusters - number)
            for number in range(LEAST_CLUSTERS)
        )
        return 1.0 - math.fsum(fewer)

    low, high = 0.0, 1.0
    for _ in range(60):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if chance(middle) < POWER else (low, middle)
    return high
