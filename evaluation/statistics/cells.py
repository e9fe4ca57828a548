"""How every system did in every stratum."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np

from evaluation.findings import Cell
from evaluation.questions import Outcome
from evaluation.statistics import student
from evaluation.statistics.intervals import Estimate, wilson_of_share
from evaluation.statistics.panels import LOSS_PER_TOKEN, MEAN_SCORE, TOKEN_ACCURACY, Measure, Part, panels
from evaluation.statistics.power import design_effect
from evaluation.statistics.resampling import NUM_RESAMPLES, Floats, percentile_interval, resampled_means


def cells(
    outcomes: Iterable[Outcome],
    systems: Sequence[str],
    strata: Sequence[str],
    *,
    num_resamples: int = NUM_RESAMPLES,
    seed: int = 0,
) -> list[Cell]:
    """Mean scores, by system and then stratum.

    With one seed the interval is Wilson's for as many questions as the clusters are worth; with several it is of
    the bootstrap over seeds and clusters, the mean that of the seeds' means.

    Args:
        outcomes: of these systems and perhaps others.
        systems: their names.
        strata: ``ALL`` or "DIVISION=PART"; `panels.strata_names` has all there are.
        num_resamples: of the bootstrap.
        seed: of the bootstrap's draws.

    Raises:
        ValueError: a system has no outcomes, or two for one question; a stratum has no question of some seed; a score
            is not between 0 and 1.
    """
    return _cells(outcomes, systems, strata, MEAN_SCORE, num_resamples, seed)


def weighted_cells(
    outcomes: Iterable[Outcome],
    systems: Sequence[str],
    strata: Sequence[str],
    *,
    num_resamples: int = NUM_RESAMPLES,
    seed: int = 0,
) -> list[Cell]:
    """Negative log-probability per token: the sum over all answers, divided by the sum of their tokens.

    The interval is of the bootstrap over clusters (documents), over seeds too where there are several.

    Raises:
        ValueError: as for `cells`; an answer has no log-probability or no tokens; a stratum has one cluster only.
    """
    return _cells(outcomes, systems, strata, LOSS_PER_TOKEN, num_resamples, seed)


def accuracy_cells(
    outcomes: Iterable[Outcome],
    systems: Sequence[str],
    strata: Sequence[str],
    *,
    num_resamples: int = NUM_RESAMPLES,
    seed: int = 0,
) -> list[Cell]:
    """Share of right tokens: each answer's score weighs as much as it has tokens.

    Intervals as for `cells`: with one seed Wilson's, for as many tokens as the clusters (documents) are worth.

    Raises:
        ValueError: as for `cells`; an answer has no tokens.
    """
    return _cells(outcomes, systems, strata, TOKEN_ACCURACY, num_resamples, seed)


def _cells(
    outcomes: Iterable[Outcome],
    systems: Sequence[str],
    strata: Sequence[str],
    measure: Measure,
    num_resamples: int,
    seed: int,
) -> list[Cell]:
    found: dict[tuple[str, str], Cell] = {}
    for panel in panels(outcomes, systems, measure):
        for stratum in strata:
            part = panel.part(stratum)
            intervals = _intervals(part, measure, num_resamples, seed)
            for system, interval, means in zip(panel.systems, intervals, part.means, strict=True):
                per_seed = {each: float(mean) for each, mean in zip(part.seeds, means, strict=True)}
                found[system, stratum] = Cell(
                    system, stratum, part.num_questions, interval, per_seed, measure.name
                )
    return [found[system, stratum] for system in systems for stratum in strata]


def _intervals(part: Part, measure: Measure, num_resamples: int, seed: int) -> list[Estimate]:
    """One for each system."""
    if measure.is_share and len(part.seeds) == 1:
        return [_wilson(totals[0], part.weights[0]) for totals in part.totals]
    if measure.is_share and part.num_clusters == 1:
        return [_wilson(totals.mean(axis=0), part.weights.mean(axis=0)) for totals in part.totals]
    resamples = resampled_means(part, num_resamples=num_resamples, seed=seed)
    return [
        _bootstrapped(means, drawn, part, is_share=measure.is_share)
        for means, drawn in zip(part.means, resamples.T, strict=True)
    ]


def _bootstrapped(means: Floats, resamples: Floats, part: Part, *, is_share: bool) -> Estimate:
    value = float(means.mean())
    if is_share and value in (0.0, 1.0):  # resamples of equal answers are equal: they say nothing
        return wilson_of_share(value, part.num_clusters)
    interval = percentile_interval(means, resamples, part.num_clusters)
    most = 1.0 if is_share else math.inf
    return Estimate(value, max(0.0, interval.low), min(most, interval.high))


def _wilson(amounts: Floats, sizes: Floats) -> Estimate:
    """Of one seed, from right answers and questions (or tokens) by cluster.

    All right or all wrong: how much clusters hang together cannot be seen, and each counts as one question.
    """
    num_questions, num_clusters = float(np.sum(sizes)), len(sizes)
    share = min(1.0, float(np.sum(amounts)) / num_questions)
    if num_clusters == num_questions:
        return wilson_of_share(share, num_questions)
    if share in (0.0, 1.0) or num_clusters == 1:
        return wilson_of_share(share, num_clusters)
    few = student.quantile(0.95, round(num_questions) - 1) / student.quantile(0.95, num_clusters - 1)
    return wilson_of_share(share, num_questions / design_effect(amounts, sizes) * few * few)
