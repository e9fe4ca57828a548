"""Any two systems of one evaluation, or of two that asked the same questions, compared."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from evaluation.findings import ALL, Comparison
from evaluation.questions import Outcome
from evaluation.scores import Scores
from evaluation.statistics.comparing import compare
from evaluation.statistics.panels import divisions_of, strata_names

OTHER = "other/"
"""Stands before the name of a system of the other evaluation, where both have one of the same name."""


def compare_scores(
    mine: Scores, first: str, theirs: Scores, second: str, strata: Sequence[str] = ()
) -> tuple[list[Comparison], dict[str, str]]:
    """First minus second on the questions that both were asked, one comparison for each stratum; and labels to show.

    Args:
        mine, theirs: where the systems are found; may be the same.
        strata: "DIVISION=PART"; none = all questions, and every part of every division.

    Raises:
        InvalidRequest: there is no such system.
        ValueError: the two were asked nothing alike, or there is no such stratum.
    """
    other_name = OTHER + second if first == second else second
    ours = list(mine.outcomes(first))
    others = [replace(each, system=other_name) for each in theirs.outcomes(second)]
    common = {_key(each) for each in ours} & {_key(each) for each in others}
    if not common:
        raise ValueError(f"{first} and {second} were asked no question alike, of the same training seed")
    outcomes = list(_of(ours, common)) + list(_of(others, common))
    chosen = tuple(strata) or (ALL, *strata_names(divisions_of(outcomes)))
    labels = {note.name: note.label for note in (*theirs.notes, *mine.notes)}
    labels[other_name] = labels[second] + (" (other evaluation)" if first == second else "")
    return compare(outcomes, [(first, other_name)], tuple(dict.fromkeys(chosen))), labels


def _of(outcomes: Sequence[Outcome], common: set[tuple[int, str]]) -> Iterator[Outcome]:
    return (each for each in outcomes if _key(each) in common)


def _key(outcome: Outcome) -> tuple[int, str]:
    return outcome.seed, outcome.question.id
