"""The bootstrap: seeds drawn anew, and clusters of questions, for all systems at once."""

from __future__ import annotations

import math
from statistics import NormalDist

import numpy as np
import numpy.typing as npt

from evaluation.statistics import student
from evaluation.statistics.intervals import Estimate
from evaluation.statistics.panels import Part

NUM_RESAMPLES = 4000
_CHUNK_CELLS = 2_000_000
Floats = npt.NDArray[np.float64]


def resampled_means(part: Part, *, num_resamples: int = NUM_RESAMPLES, seed: int = 0) -> Floats:
    """Means of all systems in resamples that all of them share, [resamples, systems].

    A resample draws as many clusters as there are, with replacement, and S training seeds. Seeds that were asked the
    same clusters get the same draw of them, because a question that is hard is hard for every seed; seeds that
    were asked different ones get draws of their own. What both draws change is added up:

        mean over seeds of (mean in the drawn clusters) + sum over seeds of (m - 1) / S * (mean of the seed)

    Here m says how often the seed was drawn, widened to 1 + (m - 1) sqrt(S / (S - 1)) (Rao and Wu 1988), for else
    S seeds would vary too little, by a third of the variance when S is three. Drawn in one another instead of added,
    seeds and clusters would count the chance in single answers three times (Owen 2007); so it is counted twice.

    Args:
        part: what is resampled.
        num_resamples: draws.
        seed: of the draws, which depend on nothing else but the numbers of seeds and clusters.
    """
    rng = np.random.default_rng(seed)
    num_seeds, num_clusters = part.is_there.shape
    means = _seed_draws(rng, num_seeds, num_resamples) @ part.means.T
    step = max(1, _CHUNK_CELLS // num_clusters)
    for start in range(0, num_resamples, step):
        drawn = slice(start, min(start + step, num_resamples))
        draws = _cluster_draws(rng, part.is_there, drawn.stop - drawn.start)
        for at in range(num_seeds):
            mean = (draws @ part.totals[:, at].T) / (draws @ part.weights[at])[:, None]
            means[drawn] += mean / num_seeds
    return np.asarray(means)


def percentile_interval(
    per_seed: Floats, resamples: Floats, num_clusters: int, confidence: float = 0.95
) -> Estimate:
    """The mean over seeds with the resamples' percentiles, taken farther out where seeds or clusters are few.

    Resamples of K clusters vary too little by sqrt((K - 1) / K), and percentiles are those of a known spread: both are
    made up for by moving them away from the value by t / z sqrt(K / (K - 1)). The degrees of freedom of t are
    Satterthwaite's, from those of the seeds (S - 1) and of the clusters (K - 1), weighed by the variance each brings.

    Args:
        per_seed: [S], the value of each seed.
        resamples: of their mean.
        num_clusters: K.
        confidence: of the interval.

    Raises:
        ValueError: fewer than two clusters, which say nothing about a third one.
    """
    if num_clusters < 2:
        raise ValueError(f"num_clusters = {num_clusters} is not allowed: at least 2 can be resampled")
    value = float(per_seed.mean())
    freedom = _freedom(per_seed, float(resamples.var()), num_clusters)
    z = NormalDist().inv_cdf(0.5 + confidence / 2.0)
    farther = student.quantile(confidence, freedom) / z * math.sqrt(num_clusters / (num_clusters - 1))
    tail = 0.5 - confidence / 2.0
    low, high = np.quantile(resamples, [tail, 1.0 - tail])
    return Estimate(
        value,
        min(value, _stable(value - farther * (value - low))),
        max(value, _stable(value + farther * (high - value))),
    )


def _freedom(per_seed: Floats, variance: float, num_clusters: int) -> int:
    """Satterthwaite's, rounded down."""
    if per_seed.size == 1 or variance <= 0.0:
        return num_clusters - 1
    by_seeds = min(variance, float(per_seed.var(ddof=1)) / per_seed.size)
    by_clusters = variance - by_seeds
    parts = by_seeds**2 / (per_seed.size - 1) + by_clusters**2 / (num_clusters - 1)
    return max(1, min(num_clusters + per_seed.size, math.floor(variance**2 / parts + 1e-9)))


def _stable(number: float) -> float:
    """Without the last bits, in which a sum of fractions may depend on the order it was made in."""
    return round(float(number), 12)


def _seed_draws(rng: np.random.Generator, num_seeds: int, num_resamples: int) -> Floats:
    """How much more than its share each seed weighs, [resamples, seeds]; each row sums to 0."""
    if num_seeds == 1:
        return np.zeros((num_resamples, 1))
    drawn = rng.multinomial(num_seeds, np.full(num_seeds, 1.0 / num_seeds), size=num_resamples)
    return np.asarray((drawn - 1.0) * math.sqrt(num_seeds / (num_seeds - 1)) / num_seeds)


def _cluster_draws(rng: np.random.Generator, is_there: npt.NDArray[np.bool_], num_resamples: int) -> Floats:
    """How often each cluster was drawn, [resamples, K]; clusters of the same seeds are drawn among themselves."""
    draws = np.zeros((num_resamples, is_there.shape[1]))
    patterns, which = np.unique(is_there, axis=1, return_inverse=True)
    rows = np.arange(num_resamples)[:, None]
    for pattern in range(patterns.shape[1]):
        places = np.flatnonzero(which.ravel() == pattern)
        picks = rng.integers(len(places), size=(num_resamples, len(places))) + rows * len(places)
        counts = np.bincount(picks.ravel(), minlength=num_resamples * len(places))
        draws[:, places] = counts.reshape(num_resamples, len(places))
    return draws
