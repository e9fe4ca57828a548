"""Answers in LaTeX as values: expressions, tuples, intervals, sets, unions, matrices, equations, words."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from fractions import Fraction

from evaluation.verifiers.expressions import Expression, NotComparable, atom, number

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
_THOUSANDS = re.compile(r"(?<![\d.])\d{1,3}(?:,\d{3})+(?![\d,])")
_NAMED_SIDE = re.compile(r"^(?:[A-Za-z](?:_\{?\w+\}?)?|[a-zA-Z]\([a-zA-Z]\))$")
_MATRIX = re.compile(r"^\\begin\{[pbvB]?matrix\}(.*)\\end\{[pbvB]?matrix\}$", re.DOTALL)
_BASED = re.compile(r"^([0-9A-F]+)_\{?([0-9]+)\}?$")
_OPENING, _CLOSING = "([{", ")]}"
_TOKEN = re.compile(r"\\[A-Za-z]+|\\.|\d+\.\d*|\.\d+|\d+|[A-Za-z]|\S")
_FUNCTIONS = frozenset(
    (
        *("sin", "cos", "tan", "cot", "sec", "csc", "arcsin", "arccos", "arctan", "sinh", "cosh", "tanh"),
        *("log", "ln", "exp", "det", "gcd", "lcm", "min", "max"),
    )
)
_GREEK = frozenset(
    (
        *("alpha", "beta", "gamma", "delta", "epsilon", "theta", "lambda", "mu", "nu", "phi", "psi", "rho"),
        *("sigma", "tau", "omega", "infty"),
    )
)


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
    if _THOUSANDS.fullmatch(text):
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
        return frozenset({_Parser(text.replace(r"\pm", sign)).whole() for sign in "+-"})
    return _Parser(text).whole()


def _set(text: str) -> Value:
    items: set[object] = set()
    for part in _split(text, ","):
        value = _value(part)
        items |= value if isinstance(value, frozenset) else {value}
    return frozenset(items)


def _equation(left: str, right: str) -> Value:
    """Both sides on one side, by its leading coefficient."""
    difference = _Parser(left).whole() - _Parser(right).whole()
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


class _Parser:
    """One expression, by descent."""

    def __init__(self, text: str) -> None:
        text = _THOUSANDS.sub(lambda match: match[0].replace(",", ""), text)
        self._tokens: list[str] = _TOKEN.findall(text)
        self._at = 0

    def whole(self) -> Expression:
        """The expression; all of the text has to belong to it."""
        value = self._sum()
        if self._at != len(self._tokens):
            raise NotComparable
        return value

    def _next(self) -> str:
        return self._tokens[self._at] if self._at < len(self._tokens) else ""

    def _take(self) -> str:
        self._at += 1
        return self._tokens[self._at - 1]

    def _expect(self, token: str) -> None:
        if self._take() != token:
            raise NotComparable

    def _sum(self) -> Expression:
        value = self._product()
        while self._next() in ("+", "-"):
            value = value + self._product() if self._take() == "+" else value - self._product()
        return value

    def _product(self) -> Expression:
        sign = 1
        while self._next() in ("+", "-"):
            sign = -sign if self._take() == "-" else sign
        value = self._power()
        while self._next() and self._next() not in "+-)]},|=<>;:":
            if self._next() == "/":
                self._take()
                value = value / self._power()
            else:
                if self._next() == "*":
                    self._take()
                value = value * self._signed_power()
        return -value if sign < 0 else value

    def _signed_power(self) -> Expression:
        if self._next() == "-":
            self._take()
            return -self._power()
        return self._power()

    def _power(self) -> Expression:
        value = self._mixed_number() or self._primary()
        if self._next() == "^":
            self._take()
            exponent = self._argument()
            rational = exponent.rational
            value = atom(f"{value}^[{exponent}]") if rational is None else value.power(rational)
        return value

    def _mixed_number(self) -> Expression | None:
        r"""A whole number with a fraction after it, ``1\frac{4}{5}``, which is their sum."""
        begin = self._at
        if self._next().isdigit() and self._tokens[begin + 1 : begin + 2] == [r"\frac"]:
            whole = Fraction(self._take())
            self._take()
            top, bottom = self._argument().rational, self._argument().rational
            if top is not None and bottom and top.denominator == bottom.denominator == 1 and 0 < top < bottom:
                return number(whole + top / bottom)
        self._at = begin
        return None

    def _primary(self) -> Expression:
        token = self._take()
        if token[0].isdigit() or token[0] == ".":
            if len(token) > 400:
                raise NotComparable
            return number(Fraction(token if token != "." else "x"))
        if token.isalpha():
            return self._name(token)
        closing = {"(": ")", "[": "]", "{": "}"}.get(token)
        if closing:
            value = self._sum()
            self._expect(closing)
            return value
        if token == "|":
            value = self._sum()
            self._expect("|")
            rational = value.rational
            return atom(f"|{value}|") if rational is None else number(abs(rational))
        return self._command(token[1:]) if token[0] == "\\" else self._unknown()

    def _name(self, letter: str) -> Expression:
        if self._next() == "_":
            self._take()
            return atom(f"{letter}_{self._argument()}")
        return atom(letter)

    def _command(self, name: str) -> Expression:
        commands: dict[str, Callable[[], Expression]] = {
            "frac": lambda: self._argument() / self._argument(),
            "sqrt": self._root,
            "pi": lambda: atom("pi"),
        }
        if name in commands:
            return commands[name]()
        if name in _GREEK:
            return self._name(name)
        if name in _FUNCTIONS:
            return self._function(name)
        return self._unknown()

    def _function(self, name: str) -> Expression:
        for mark in ("_", "^"):
            if self._next() == mark:
                self._take()
                name += f"{mark}{self._argument()}"
        return atom(f"{name}({self._power()})")

    def _root(self) -> Expression:
        degree = Fraction(2)
        if self._next() == "[":
            self._take()
            degree = self._sum().rational or Fraction(0)
            self._expect("]")
        if degree.denominator != 1 or not 2 <= degree <= 64:
            raise NotComparable
        inside = self._argument()
        try:
            return inside.power(1 / degree)
        except NotComparable:
            return atom(f"root {degree} of ({inside})")

    def _argument(self) -> Expression:
        r"""A group in braces, or a single digit or sign as TeX takes it: ``\frac65``, ``\sqrt2``."""
        token = self._next()
        if token == "{":
            return self._primary()
        if token[:1].isdigit() and len(token) > 1:
            self._tokens[self._at : self._at + 1] = [token[0], token[1:]]
        if token == "-":
            self._take()
            return -self._argument()
        return self._primary()

    @staticmethod
    def _unknown() -> Expression:
        raise NotComparable


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
