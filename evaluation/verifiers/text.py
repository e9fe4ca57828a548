"""Answers that are text: equal, containing, matching, or choosing a letter."""

from __future__ import annotations

import re
from functools import lru_cache

from evaluation.questions import RIGHT, Answer, Question, Verdict
from fusionroute.answer_forms import last_choice

MAX_CHARACTERS = 100_000
"""Of an answer that patterns are looked for in; the end of a longer one is looked at."""
_MAX_SHOWN = 60


def verify_exact(question: Question, answer: Answer) -> Verdict:
    """Equal to the reference but for white space around."""
    if answer.text.strip() == question.reference.strip():
        return RIGHT
    return Verdict(
        0.0, f"{answer.text.strip()[:_MAX_SHOWN]!r} instead of {question.reference[:_MAX_SHOWN]!r}"
    )


def verify_contains(question: Question, answer: Answer) -> Verdict:
    """The reference is in the answer, upper or lower case, any white space between words."""
    wanted, found = " ".join(question.reference.split()), " ".join(answer.text.split())
    if wanted and wanted.casefold() in found.casefold():
        return RIGHT
    return Verdict(0.0, f"{wanted[:_MAX_SHOWN]!r} is not in it")


def verify_regex(question: Question, answer: Answer) -> Verdict:
    """The reference, a regular expression of Python's, matches somewhere in the answer; ``^`` and ``$`` at lines."""
    if _compiled(question.reference).search(answer.text[-MAX_CHARACTERS:]):
        return RIGHT
    return Verdict(0.0, f"nothing matches {question.reference[:_MAX_SHOWN]!r}")


def verify_choice(question: Question, answer: Answer) -> Verdict:
    """The letter chosen is the reference's; see `last_choice`."""
    found, gold = last_choice(answer.text), last_choice(question.reference)
    if found is not None and found == gold:
        return RIGHT
    return Verdict(0.0, "no letter" if found is None else f"{found} instead of {gold}")


@lru_cache(maxsize=256)
def _compiled(pattern: str) -> re.Pattern[str]:
    return re.compile(pattern, re.MULTILINE)
