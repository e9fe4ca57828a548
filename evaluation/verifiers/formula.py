"""One formula in LaTeX, or as people type it, as an expression."""

from __future__ import annotations

import re
from collections.abc import Callable
from fractions import Fraction

from evaluation.verifiers.expressions import Expression, NotComparable, atom, number

THOUSANDS = re.compile(r"(?<![\d.])\d{1,3}(?:,\d{3})+(?![\d,])")
MAX_DIGITS = 400
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


class Formula:
    """Reads one expression by descent.

    Args:
        text: without units, dollar signs and spacing commands; commas stand between groups of three digits only.
    """

    def __init__(self, text: str) -> None:
        text = THOUSANDS.sub(lambda match: match[0].replace(",", ""), text)
        self._tokens: list[str] = _TOKEN.findall(text)
        self._at = 0

    def whole(self) -> Expression:
        """The expression; all of the text has to belong to it.

        Raises:
            NotComparable, IndexError, ValueError, RecursionError: it is none that can be read.
        """
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
            if len(token) > MAX_DIGITS:
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
