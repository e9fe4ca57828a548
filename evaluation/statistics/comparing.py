"""Two systems on the same questions: the difference, how sure it is, and what a null result could have missed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np

from evaluation.findings import SCORE, Comparison
from evaluation.questions import Outcome
from evaluation.statistics import student
from evaluation.statistics.intervals import Estimate
from evaluation.statistics.mixed import crossed_mean, nested_mean
from evaluation.statistics.panels import (
    LOSS_PER_TOKEN,
    MEAN_SCORE,
    TOKEN_ACCURACY,
    Measure,
    Panel,
    Part,
    panels,
    why_unpaired,
)
from evaluation.statistics.power import detectable_difference
from evaluation.statistics.resampling import NUM_RESAMPLES, Floats, percentile_interval, resampled_means
from evaluation.statistics.significance import holm, mcnemar, sign_flip

Pair = tuple[str, str]


def compare(
    outcomes: Iterable[Outcome],
    pairs: Sequence[Pair],
    strata: Sequence[str],
    *,
    num_resamples: int = NUM_RESAMPLES,
    seed: int = 0,
) -> list[Comparison]:
    """Differences of mean scores, first minus second, by pair and then stratum.

    All comparisons of one call are one family for Holm's adjustment: ask for those that you will look at.

    Two questions are answered apart. The p-value and the detectable difference are about *these* models on further
    questions of the kind; they take clusters for draws and seeds as they are. `over_seeds`, `mixed` and the
    bootstrap are about further training seeds too.

    Args:
        outcomes: of these systems and perhaps others.
        pairs: names of two systems each.
        strata: ``ALL`` or "DIVISION=PART".
        num_resamples: of the bootstrap.
        seed: of the bootstrap's draws.

    Raises:
        ValueError: the systems of a pair have not answered the same questions with the same seeds (the message names
            what is missing); otherwise as for `cells`.
    """
    return _compare(outcomes, pairs, strata, MEAN_SCORE, num_resamples, seed)


def weighted_compare(
    outcomes: Iterable[Outcome],
    pairs: Sequence[Pair],
    strata: Sequence[str],
    *,
    num_resamples: int = NUM_RESAMPLES,
    seed: int = 0,
) -> list[Comparison]:
    """Differences of the negative log-probability per token, first minus second: below 0 the first is better.

    As `compare`, for forced answers: both systems must have been given the same tokens.

    Raises:
        ValueError: as for `compare`; an answer's tokens are not as many for both systems; a stratum has one cluster.
    """
    return _compare(outcomes, pairs, strata, LOSS_PER_TOKEN, num_resamples, seed)


def accuracy_compare(
    outcomes: Iterable[Outcome],
    pairs: Sequence[Pair],
    strata: Sequence[str],
    *,
    num_resamples: int = NUM_RESAMPLES,
    seed: int = 0,
) -> list[Comparison]:
    """Differences of the share of right tokens, first minus second; both systems were given the same tokens.

    Raises:
        ValueError: as for `compare`; an answer's tokens are not as many for both systems.
    """
    return _compare(outcomes, pairs, strata, TOKEN_ACCURACY, num_resamples, seed)


def _compare(
    outcomes: Iterable[Outcome],
    pairs: Sequence[Pair],
    strata: Sequence[str],
    measure: Measure,
    num_resamples: int,
    seed: int,
) -> list[Comparison]:
    systems = list(dict.fromkeys(name for pair in pairs for name in pair))
    by_system = {name: panel for panel in panels(outcomes, systems, measure) for name in panel.systems}
    for pair in pairs:
        one, other = by_system[pair[0]], by_system[pair[1]]
        if one is not other:
            raise ValueError(
                f"{pair[0]!r} and {pair[1]!r} cannot be paired: {why_unpaired(one, other, pair)}"
            )
    found: dict[tuple[Pair, str], Comparison] = {}
    for panel in {id(panel): panel for panel in by_system.values()}.values():
        mine = [pair for pair in pairs if by_system[pair[0]] is panel]
        for stratum in strata:
            part = panel.part(stratum)
            resamples = resampled_means(part, num_resamples=num_resamples, seed=seed)
            for pair in mine:
                found[pair, stratum] = _compared(panel, part, pair, resamples, measure)
    family = [found[pair, stratum] for pair in pairs for stratum in strata]
    adjusted = holm([each.p_value for each in family])
    return [replace(each, p_adjusted=p) for each, p in zip(family, adjusted, strict=True)]


def _compared(panel: Panel, part: Part, pair: Pair, resamples: Floats, measure: Measure) -> Comparison:
    """Before Holm."""
    first, second = panel.place(pair[0]), panel.place(pair[1])
    per_seed = part.means[first] - part.means[second]
    between = part.totals[first] - part.totals[second]
    sums = part.weights.sum(axis=1)
    is_even = bool(np.all(sums == sums[0]))
    by_cluster = between.sum(axis=0) if is_even else (between / sums[:, None]).sum(axis=0)
    parts = (between / sums[:, None]).sum(axis=0) / len(sums)
    only_first, only_second = _one_only(panel, part, first, second, measure)
    several = len(part.seeds) > 1
    return Comparison(
        first=pair[0],
        second=pair[1],
        stratum=part.name,
        num_questions=part.num_questions,
        num_clusters=part.num_clusters,
        difference=_interval(per_seed, resamples[:, first] - resamples[:, second], part, measure),
        over_seeds=student.mean_interval(per_seed.tolist()) if several else None,
        mixed=_mixed(part, between, per_seed) if several else None,
        only_first=only_first,
        only_second=only_second,
        p_value=(p_value := sign_flip(by_cluster)),
        p_adjusted=p_value,
        detectable=detectable_difference(parts, is_score=measure.name == SCORE),
        per_seed={each: float(value) for each, value in zip(part.seeds, per_seed, strict=True)},
        measure=measure.name,
        mcnemar=mcnemar(only_first, only_second) if measure.name == SCORE else None,
    )


def _interval(per_seed: Floats, resamples: Floats, part: Part, measure: Measure) -> Estimate:
    if not measure.is_share:
        return percentile_interval(per_seed, resamples, part.num_clusters)
    if part.num_clusters == 1:  # anything may be true of another one
        return Estimate(float(per_seed.mean()), -1.0, 1.0)
    wide = percentile_interval(per_seed, resamples, part.num_clusters)
    return Estimate(wide.value, max(-1.0, wide.low), min(1.0, wide.high))


def _mixed(part: Part, between: Floats, per_seed: Floats) -> Estimate:
    """Of the differences by seed and cluster, brought to equal weights by linearising the ratio of sums."""
    if part.num_clusters < 2:
        return student.mean_interval(per_seed.tolist())
    sums = part.weights.sum(axis=1)
    numbers = part.is_there.sum(axis=1)
    off = (between - per_seed[:, None] * part.weights) * (numbers / sums)[:, None]
    if part.is_there.all():
        return crossed_mean(per_seed[:, None] + off)
    freedom = np.maximum(1, numbers - 1)
    return nested_mean(per_seed, (off * off).sum(axis=1) / (numbers * freedom))


def _one_only(panel: Panel, part: Part, first: int, second: int, measure: Measure) -> tuple[int, int]:
    """Questions on which the first alone is right, and the second; of texts those on which each is the better one."""
    counts = [0, 0]
    for sitting, places in zip(panel.sittings, part.members, strict=True):
        mine, theirs = sitting.amounts[first][places], sitting.amounts[second][places]
        if measure.name == SCORE:
            counts[0] += int(np.sum((mine >= 1.0) & (theirs < 1.0)))
            counts[1] += int(np.sum((theirs >= 1.0) & (mine < 1.0)))
        else:
            lead = (mine - theirs) * (1.0 if measure.is_share else -1.0)
            counts[0] += int(np.sum(lead > 0.0))
            counts[1] += int(np.sum(lead < 0.0))
    return counts[0], counts[1]
