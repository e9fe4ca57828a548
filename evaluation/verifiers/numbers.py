r"""Answers that are numbers or formulas: the one that a text ends in, compared exactly.

number    "so it is 1,250.00 dollars"      "#### 1250"
math      "Thus $x = \boxed{\frac12}$."    "0.5"
"""

from __future__ import annotations

import re
from enum import Enum
from fractions import Fraction

from evaluation.questions import RIGHT, Answer, Question, Verdict
from evaluation.verifiers.expressions import Expression
from evaluation.verifiers.latex import Value, boxed, is_word, value_of
from fusionroute.answer_forms import first_number, last_number

_MARK = "####"
_PHRASE = re.compile(r"(?:final answer|answer)(?: is| would be)?\s*[:=]?\s*(?!is\b)", re.IGNORECASE)
_FORMULA = re.compile(r"\$\$(.+?)\$\$|\$(.+?)\$|\\\((.+?)\\\)|\\\[(.+?)\\\]", re.DOTALL)
MAX_SHOWN_CHARACTERS = 60


class GoldKind(Enum):
    """What a gold answer is; it alone decides which items are numeric."""

    NUMBER = "number"
    """A fraction, whole or decimal number; units, degrees, currency and percent signs aside."""
    CONSTANT = "constant"
    """Another real number: with roots or pi."""
    OTHER = "other"
    """A formula, tuple, interval, set, matrix, equation, complex number, number in another base, or word."""


def verify_number(question: Question, answer: Answer) -> Verdict:
    """Whether the answer ends in the reference's number; see `final_number`."""
    gold, found = final_number(question.reference), final_number(answer.text)
    if found is not None and found == gold:
        return RIGHT
    return Verdict(0.0, "no number" if found is None else f"{found} instead of {gold}"[:200])


def verify_math(question: Question, answer: Answer) -> Verdict:
    """Whether the answer ends in something that equals the reference; see `final_formula` and `same_formula`."""
    found = final_formula(answer.text)
    if found and same_formula(found, question.reference):
        return RIGHT
    shown = found[:MAX_SHOWN_CHARACTERS]
    return Verdict(
        0.0, f"{shown} instead of {question.reference[:MAX_SHOWN_CHARACTERS]}" if found else "no answer"
    )


def final_number(text: str) -> Fraction | None:
    r"""The number that a text ends in; None without one.

    The first one after the last ``####``; else the last one in the last ``\boxed``; else the first one after the
    last "answer is" on its line; else the last one.
    """
    if _MARK in text:
        return _result(text.rpartition(_MARK)[2].lstrip().partition("\n")[0])
    if (box := boxed(text)) is not None and (value := last_number(box)) is not None:
        return value
    for match in reversed(list(_PHRASE.finditer(text))):
        if (value := _result(text[match.end() :].partition("\n")[0])) is not None:
            return value
    return last_number(text)


def _result(line: str) -> Fraction | None:
    """The number that a line begins with; after a calculation, what it comes to."""
    return first_number(line.rpartition("=")[2]) or first_number(line)


def final_formula(text: str) -> str:
    r"""The formula that a text ends in, "" without one.

    The last ``\boxed``; else what follows the last "answer is" up to the end of its sentence, without dollar signs;
    else the last formula between dollar signs; else the last line that is not blank.
    """
    if (box := boxed(text)) is not None:
        return box.strip()
    if phrases := list(_PHRASE.finditer(text)):
        rest = text[phrases[-1].end() :].strip()
        if formula := _FORMULA.match(rest):
            return _inside(formula)
        return re.split(r"\n|\.(?=\s|$)", rest, maxsplit=1)[0].strip().strip("*").strip()
    if formulas := list(_FORMULA.finditer(text)):
        return _inside(formulas[-1])
    lines = text.split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), "")


def _inside(match: re.Match[str]) -> str:
    return next(group for group in match.groups() if group is not None).strip()


def same_formula(left: str, right: str) -> bool:
    """Whether two formulas are equal as values: order of lists and sets, form of numbers and units do not matter."""
    words = is_word(left), is_word(right)
    if words[0] is not None and words[1] is not None:
        return words[0] == words[1]
    values: tuple[Value, Value] = (value_of(left), value_of(right))
    return values[0] == values[1] and values[0] != ""


def kind_of(gold: str) -> GoldKind:
    """What kind of answer a gold one is."""
    value = value_of(gold) if is_word(gold) is None else ""
    if not isinstance(value, Expression):
        return GoldKind.OTHER
    if value.rational is not None:
        return GoldKind.NUMBER
    return GoldKind.CONSTANT if value.is_constant else GoldKind.OTHER
