"""Answers in LaTeX as values: expressions, tuples, intervals, sets, unions, matrices, equations, words."""

from __future__ import annotations

import re
from collections.abc import Iterator

from evaluation.verifiers.expressions import Expression, NotComparable, number
from evaluation.verifiers.formula import THOUSANDS, Formula

MAX_CHARACTERS = 2000
Value = Expression | str | tuple[object, ...] | frozenset[object]

_SPACES = re.compile(
    r"(?<!\\)\\[!,;:> ]|~|\\(?:q?quad|displaystyle|limits|left|right|(?:big|Big)[lr]?)(?![A-Za-z])"
)
_DIGIT_COMMA = re.compile(r",\s*\\!\s*|\{,\}")  # within a number: ten thousand as 10,\!000 or 10{,}000
_UNITS = re.compile(r"\^\s*\{?\s*\\circ\s*\}?|\\degree\b|\\%|%|\\\$|\$|°|\\pounds\b")
_WORDS = re.compile(
    r"\\(?:text(?:bf|it|rm|sf)?|mbox|mathrm|mathbf|operatorname)\s*\{([^{}]*)\}(?:\s*\^\s*\{?[0-9]\}?)?"
)
_PLAIN_UNIT = re.compile(
    r"(?<=[0-9}) ])\s*(?<![\\A-Za-z])[A-Za-z]{2,}(?:\s+[A-Za-z]{2,})*(?:\s*\^\s*\{?[23]\}?)?\s*\.?$"
)
_REPLACED = (
    (re.compile(r"\\[dtc]frac\b"), r"\\frac"),
    (re.compile(r"\\(?:cdot|times|ast)(?![A-Za-z])|[·×]"), "*"),
    (re.compile(r"\\div\b|÷"), "/"),
    (re.compile(r"\\(?:le|leq|leqslant)\b|≤|<="), "<="),
    (re.compile(r"\\(?:ge|geq|geqslant)\b|≥|>="), ">="),
    (re.compile(r"π"), r"\\pi "),
    (re.compile(r"√"), r"\\sqrt "),
    (re.compile(r"∞"), r"\\infty "),
    (re.compile(r"−"), "-"),
    (re.compile(r"∪"), r"\\cup "),
)
_NAMED_SIDE = re.compile(r"^(?:[A-Za-z](?:_\{?\w+\}?)?|[a-zA-Z]\([a-zA-Z]\))$")
_MATRIX = re.compile(r"^\\begin\{[pbvB]?matrix\}(.*)\\end\{[pbvB]?matrix\}$", re.DOTALL)
_BASED = re.compile(r"^([0-9A-F]+)_\{?([0-9]+)\}?$")
_OPENING, _CLOSING = "([{", ")]}"


def value_of(text: str) -> Value:
    """What an answer stands for; of two that cannot be read, those with the same characters are equal."""
    plain = _cleaned(text[:MAX_CHARACTERS])
    try:
        return _value(plain)
    except (NotComparable, IndexError, ValueError, RecursionError):
        return re.sub(r"\s+|[{}]", "", plain).casefold()


def is_word(text: str) -> str | None:
    """The word or letter that an answer consists of, lower case; None where there is something else."""
    bare = _WORDS.sub(lambda match: f" {match[1]} ", text).replace("$", " ").strip().rstrip(".").strip()
    found = re.fullmatch(r"\(?([A-Za-z][A-Za-z' -]+|[A-Z])\)?", bare)
    return found[1].strip().casefold() if found and ("\\" not in bare) else None


def _cleaned(text: str) -> str:
    text = _SPACES.sub(" ", _DIGIT_COMMA.sub(",", text))
    text = _WORDS.sub(lambda match: ", " if match[1].strip() in ("and", "or") else " ", text)
    text = _UNITS.sub(" ", text)
    for pattern, replacement in _REPLACED:
        text = pattern.sub(replacement, text)
    text = text.strip().rstrip(".").strip()
    return _PLAIN_UNIT.sub("", text).strip()


def _value(text: str) -> Value:
    text = text.strip()
    if found := _BASED.match(text):
        return ("base", found[1], found[2])
    if THOUSANDS.fullmatch(text):
        return number(int(text.replace(",", "")))
    if r"\in" in text and (parts := re.split(r"\\in(?![A-Za-z])", text))[1:]:
        return _value(parts[-1])
    if (parts := _split(text, "=")) and len(parts) == 2 and not re.search("[<>]", text):
        return _value(parts[1]) if _NAMED_SIDE.match(parts[0].strip()) else _equation(*parts)
    if r"\cup" in text:
        return ("union", frozenset(_value(part) for part in re.split(r"\\cup(?![A-Za-z])", text)))
    if found := _MATRIX.match(text):
        rows = re.split(r"\\\\", found[1])
        return ("matrix", *(tuple(_value(cell) for cell in row.split("&")) for row in rows if row.strip()))
    return _several(text)


def _several(text: str) -> Value:
    """A list, set, tuple or interval, else one expression."""
    if text.startswith(r"\{") and text.endswith(r"\}"):
        return _set(text[2:-2])
    parts = _split(text, ",")
    if len(parts) > 1:
        return _set(text)
    if text[:1] in ("(", "[") and text[-1:] in (")", "]") and len(inner := _split(text[1:-1], ",")) > 1:
        return ("tuple", text[0], text[-1], *(_value(part) for part in inner))
    if r"\pm" in text:
        return frozenset({Formula(text.replace(r"\pm", sign)).whole() for sign in "+-"})
    return Formula(text).whole()


def _set(text: str) -> Value:
    items: set[object] = set()
    for part in _split(text, ","):
        value = _value(part)
        items |= value if isinstance(value, frozenset) else {value}
    return frozenset(items)


def _equation(left: str, right: str) -> Value:
    """Both sides on one side, by its leading coefficient."""
    difference = Formula(left).whole() - Formula(right).whole()
    if not difference.terms:
        raise NotComparable
    _, leading = max(difference.terms.items())
    return (
        "equation",
        Expression({product: factor / leading for product, factor in difference.terms.items()}),
    )


def _split(text: str, at: str) -> list[str]:
    """Parts between marks that stand in no bracket."""
    parts, depth, begin = [], 0, 0
    for place, character in enumerate(text):
        depth += (character in _OPENING) - (character in _CLOSING)
        if character == at and depth == 0:
            parts.append(text[begin:place])
            begin = place + 1
    return [*parts, text[begin:]]


def boxed(text: str) -> str | None:
    r"""What the last ``\boxed{...}`` holds; None without one that is closed."""
    for place in reversed(list(_boxes(text))):
        depth = 0
        for end in range(place, len(text)):
            depth += (text[end] == "{") - (text[end] == "}")
            if depth == 0:
                return text[place + 1 : end]
    return None


def _boxes(text: str) -> Iterator[int]:
    for match in re.finditer(r"\\f?boxed\s*(?=\{)", text):
        yield match.end()
