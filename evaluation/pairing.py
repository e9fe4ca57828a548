"""Any two systems of one evaluation, or of two that asked the same questions, compared."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from evaluation.findings import Comparison
from evaluation.questions import Outcome
from evaluation.scores import Scores
from evaluation.statistics.comparing import accuracy_compare, compare, weighted_compare
from evaluation.statistics.panels import divisions_of, strata_names

OTHER = "other/"
"""Stands before the name of a system of the other evaluation, where both have one of the same name."""


def compare_scores(
    mine: Scores, first: str, theirs: Scores, second: str, strata: Sequence[str] = ()
) -> tuple[list[Comparison], dict[str, str]]:
    """First minus second on the questions that both were asked, and on the texts that both have read.

    One comparison for each stratum and measure; and labels to show.

    Args:
        mine, theirs: where the systems are found; may be the same.
        strata: "DIVISION=PART"; none = all questions, and every part of every division.

    Raises:
        InvalidRequest: there is no such system.
        ValueError: the two were asked nothing alike, or there is no such stratum.
    """
    other_name = OTHER + second if first == second else second
    found: list[Comparison] = []
    known: set[str] = set()
    for ours, others, comparisons in (
        (mine.outcomes_of(first), theirs.outcomes_of(second), (compare,)),
        (mine.views_of(first), theirs.views_of(second), (weighted_compare, accuracy_compare)),
    ):
        outcomes = _common(list(ours), [replace(each, system=other_name) for each in others])
        there = strata_names(divisions_of(outcomes)) if outcomes else ()
        known.update(there)
        chosen = [stratum for stratum in strata or there if stratum in there]
        if chosen:
            for each in comparisons:
                found += each(outcomes, [(first, other_name)], list(dict.fromkeys(chosen)))
    if not known:
        raise ValueError(f"{first} and {second} were asked no question alike, of the same training seed")
    for stratum in strata:
        if stratum not in known:
            raise ValueError(f"stratum = {stratum!r} is not allowed: one of {', '.join(sorted(known))}")
    labels = {note.name: note.label for note in (*theirs.notes, *mine.notes)}
    labels[other_name] = labels[second] + (" (other evaluation)" if first == second else "")
    return found, labels


def _common(ours: Sequence[Outcome], others: Sequence[Outcome]) -> list[Outcome]:
    """Of both, on what both were asked."""
    keys = {_key(each) for each in ours} & {_key(each) for each in others}
    return [each for each in (*ours, *others) if _key(each) in keys]


def _key(outcome: Outcome) -> tuple[int, str]:
    return outcome.seed, outcome.question.id
