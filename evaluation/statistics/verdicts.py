"""What a comparison shows, in words, with no more certainty than it has."""

from __future__ import annotations

import math
from collections.abc import Mapping

from evaluation.findings import ACCURACY, ALL, NLL, SCORE, Comparison
from evaluation.statistics.intervals import Estimate
from evaluation.statistics.power import LEAST_CLUSTERS, LEVEL

UNITS = {NLL: " nats per token", ACCURACY: " of the tokens"}


def verdict_sentence(comparison: Comparison, labels: Mapping[str, str] | None = None) -> str:
    """One or two sentences.

    "Is ahead" is said only where the p-value is below 5 % after Holm and the interval of the difference leaves out
    0; with several seeds the interval of the mixed summary is told as well, and where it holds 0, that another
    training may come out otherwise. A null result comes with the smallest difference that would probably have been
    seen: it does not say that the systems are equal.

    Args:
        comparison: of two systems.
        labels: names to show for those of systems.
    """
    names = labels or {}
    first = names.get(comparison.first, comparison.first)
    second = names.get(comparison.second, comparison.second)
    where = f"all {_things(comparison)}" if comparison.stratum == ALL else comparison.stratum
    measured = f"{shown_difference(comparison)}; {_amount(comparison)}"
    if comparison.num_clusters < LEAST_CLUSTERS:
        return (
            f"{first} against {second} on {where}: {measured}. "
            f"Fewer than {LEAST_CLUSTERS} clusters of {_things(comparison)} cannot show any difference."
        )
    if not is_shown(comparison):
        return f"No difference shown between {first} and {second} on {where}: {measured}. {_reservation(comparison)}"
    is_better = (comparison.difference.value > 0) is (comparison.measure != NLL)
    verb = "is ahead of" if is_better else "is behind"
    return f"{first} {verb} {second} on {where}: {measured}.{_over_seeds(comparison)}"


def is_shown(comparison: Comparison) -> bool:
    """Whether p-value after Holm and interval agree that there is a difference, of these models at least."""
    return comparison.is_significant and comparison.difference.excludes_zero


def shown_difference(comparison: Comparison) -> str:
    """In the form "+0.138 [+0.126, +0.151]"."""
    unit = UNITS.get(comparison.measure, "")
    return f"{comparison.difference.value:+.3f}{unit} {_interval(comparison.difference)}"


def shown_p(p_value: float) -> str:
    """ "p = 0.031", or "p < 0.001"."""
    return "p < 0.001" if p_value < 0.001 else f"p = {p_value:.3f}"


def _things(comparison: Comparison) -> str:
    return "questions" if comparison.measure == SCORE else "texts"


def _interval(estimate: Estimate) -> str:
    return f"[{estimate.low:+.3f}, {estimate.high:+.3f}]"


def _amount(comparison: Comparison) -> str:
    seeds = len(comparison.per_seed)
    each = f", {seeds} seeds" if seeds > 1 else ""
    clusters = comparison.num_clusters
    grouped = f" in {clusters} clusters" if clusters != comparison.num_questions else ""
    number = f"{comparison.num_questions} {_things(comparison)}"
    return f"{shown_p(comparison.p_adjusted)} after Holm, {number}{grouped}{each}"


def _reservation(comparison: Comparison) -> str:
    """What a null result leaves open."""
    seen = f"{comparison.detectable:.3f}"
    these = f"These {_things(comparison)}"
    power = f"{these} would show a true difference of {seen} in four of five cases, a smaller one less often"
    before = f"{shown_p(comparison.p_value)} before Holm"
    if comparison.p_value < LEVEL <= comparison.p_adjusted:
        return f"{power}; {before}: a hint, no more."
    if comparison.is_significant:
        return f"{power}; the interval of the bootstrap holds 0, though {before}."
    return f"{power}." if math.isfinite(comparison.detectable) else f"{these} cannot show any difference."


def _over_seeds(comparison: Comparison) -> str:
    """Whether the difference would hold for another training."""
    if comparison.mixed is None:
        return " One training seed: whether another training would show the same is not known."
    found = f" For another training ({len(comparison.per_seed)} seeds, mixed effects): {_interval(comparison.mixed)}"
    return (
        f"{found}."
        if comparison.mixed.excludes_zero
        else f"{found}, which holds 0: it may come out otherwise."
    )
