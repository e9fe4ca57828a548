"""The mean difference when training seeds and questions are both draws from many: random effects of both."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from evaluation.statistics import student
from evaluation.statistics.intervals import Estimate

Floats = npt.NDArray[np.float64]


def crossed_mean(values: npt.ArrayLike, confidence: float = 0.95) -> Estimate:
    """The grand mean of seeds x clusters, where every seed was asked every cluster, with Student's interval.

    Args:
        values: [S, K], at least two of each; equal weights.
        confidence: of the interval.

    Raises:
        ValueError: another shape.
    """
    table = np.asarray(values, dtype=np.float64)
    variance, freedom = variance_of_crossed_mean(table)
    mean = float(table.mean())
    half = student.quantile(confidence, freedom) * math.sqrt(variance)
    return Estimate(mean, mean - half, mean + half)


def variance_of_crossed_mean(values: Floats) -> tuple[float, int]:
    """Squared standard error of the grand mean of [S, K], and its degrees of freedom.

    The model is value = mean + seed + cluster + rest, all but the mean random. Of balanced data the analysis of
    variance gives the REML estimates:

        variance of the mean = (MS_seed + MS_cluster - MS_rest) / (S K)

    where an effect whose mean square is below that of the rest is none and is pooled with it. The degrees of freedom
    are Satterthwaite's, rounded down (Clark 1973 has the same for words and readers).

    Raises:
        ValueError: fewer than two seeds or clusters.
    """
    if values.ndim != 2 or min(values.shape) < 2:
        raise ValueError(f"values of shape {values.shape} are not allowed: at least 2 seeds by 2 clusters")
    num_seeds, num_clusters = values.shape
    mean = float(values.mean())
    by_seed, by_cluster = values.mean(axis=1) - mean, values.mean(axis=0) - mean
    rest = values - mean - by_seed[:, None] - by_cluster[None, :]
    seeds = _Square(num_clusters * float(by_seed @ by_seed), num_seeds - 1)
    clusters = _Square(num_seeds * float(by_cluster @ by_cluster), num_clusters - 1)
    others = _Square(float(np.sum(rest * rest)), seeds.freedom * clusters.freedom)
    square, freedom = _of_the_mean(seeds, clusters, others)
    return square / values.size, freedom


def nested_mean(means: npt.ArrayLike, variances: npt.ArrayLike, confidence: float = 0.95) -> Estimate:
    """The mean over seeds that were asked different questions.

    Student's interval over seeds, whose variance is never taken to be less than what the questions of each seed
    alone explain (Hartung and Knapp's interval as modified by Roever, Knapp and Friede 2015).

    Args:
        means: [S], one for each seed.
        variances: [S], squared standard error of each, from the clusters within the seed.
        confidence: of the interval.

    Raises:
        ValueError: fewer than two seeds.
    """
    each, within = np.asarray(means, dtype=np.float64), np.asarray(variances, dtype=np.float64)
    if each.ndim != 1 or each.shape != within.shape or each.size < 2:
        raise ValueError(f"{each.size} means with {within.size} variances are not allowed: 2 or more of both")
    mean = float(each.mean())
    variance = max(float(each.var(ddof=1)), float(within.mean())) / each.size
    half = student.quantile(confidence, each.size - 1) * math.sqrt(variance)
    return Estimate(mean, mean - half, mean + half)


class _Square:
    """A sum of squares with its degrees of freedom."""

    def __init__(self, total: float, freedom: int) -> None:
        self.total, self.freedom = total, freedom
        self.mean = total / freedom

    def __add__(self, other: _Square) -> _Square:
        return _Square(self.total + other.total, self.freedom + other.freedom)


def _of_the_mean(seeds: _Square, clusters: _Square, rest: _Square) -> tuple[float, int]:
    """Mean square that the variance of the grand mean is made of, and its degrees of freedom."""
    if seeds.mean >= rest.mean and clusters.mean >= rest.mean:
        square = seeds.mean + clusters.mean - rest.mean
        parts = sum(each.mean**2 / each.freedom for each in (seeds, clusters, rest))
        return square, max(1, math.floor(square**2 / parts)) if parts > 0.0 else 1
    left, pooled = (clusters, rest + seeds) if seeds.mean < rest.mean else (seeds, rest + clusters)
    if left.mean >= pooled.mean:
        return left.mean, left.freedom
    everything = left + pooled
    return everything.mean, everything.freedom
