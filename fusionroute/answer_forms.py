r"""What an answer says, taken out of the text around it: the last number, the letter chosen. Pure functions.

number    "so she has 1,250.00 dollars"   1250
choice    "The answer is (C)."            "C"
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from fractions import Fraction

MAX_DIGITS = 1000
"""Of a number that is read; a longer one is a model that repeats itself, and no number."""

# A comma belongs to a number only before whole groups of three digits: "1,250" is one number, "1,2" are two.
_PLAIN = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+"
# A minus is a sign unless something stands before it from which it could subtract.
_SIGN = r"(?:(?<![\w)\]])-\s?)?\$?"
_FRACTION = rf"\\d?frac\{{({_PLAIN})\}}\{{({_PLAIN})\}}"
_NUMBER = re.compile(rf"{_SIGN}(?:{_FRACTION}|({_PLAIN})(?:/({_PLAIN}))?)")
_LETTERS = (
    re.compile(r"\\boxed\{\s*(?:\\text\{)?\s*\(?([A-Z])\)?\s*\}"),
    re.compile(r"(?i:answer|choice|option)(?i:\s+is)?\s*[:=]?[\s*_]*\(?([A-Z])\)?(?![A-Za-z0-9'])"),
    re.compile(r"\(([A-Z])\)"),
    re.compile(r"^[\s*_]*([A-Z])(?=[\s*_]*(?:[.):]|$))", re.MULTILINE),
    re.compile(r"(?<![A-Za-z0-9'])([A-HJ-Z])(?![A-Za-z0-9'])"),  # any letter alone, but not the pronoun
)


def last_number(text: str) -> Fraction | None:
    r"""The last number, exactly: ``1,250.5``, ``-3``, ``1/2``, ``\frac{1}{2}``; None without one."""
    return _first_of(reversed(list(_NUMBER.finditer(text))))


def first_number(text: str) -> Fraction | None:
    """The first number, like `last_number`."""
    return _first_of(_NUMBER.finditer(text))


def _first_of(matches: Iterable[re.Match[str]]) -> Fraction | None:
    for match in matches:
        if len(match[0]) > MAX_DIGITS:
            return None
        top, bottom = match[1] or match[3], match[2] or match[4] or "1"
        numerator, denominator = (Fraction(part.replace(",", "")) for part in (top, bottom))
        if denominator:
            value = numerator / denominator
            return -value if match[0].startswith("-") else value
    return None


def last_choice(text: str) -> str | None:
    """The letter chosen: the last boxed one, else the last after "answer", "choice", "option", else in brackets,
    else one that begins a line as a heading, else any capital alone but "I"; None without one.
    """
    for pattern in _LETTERS:
        found = pattern.findall(text)
        if found:
            return str(found[-1])
    return None
