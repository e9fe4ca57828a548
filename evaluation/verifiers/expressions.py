"""Numbers and polynomials with roots, exactly: a sum of products of powers, in one form for everything that is equal.

A product maps atoms to exponents: names (``x``, ``pi``), ``i``, primes under a root (``2`` to the 1/2), or the text of
a part that is not looked into (``cot(x)``, the inverse of a sum). Two expressions with the same form are equal; two
with different forms may be, if they take more than expanding and reducing to see.
"""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction
from functools import reduce

MAX_TERMS, MAX_POWER, MAX_BITS = 400, 64, 4000
_MAX_UNDER_ROOT = 10**8
_HALF = Fraction(1, 2)
REAL_CONSTANTS = frozenset({"pi"})

Product = tuple[tuple[str, Fraction], ...]


class NotComparable(Exception):
    """Too large, or of a kind that has no form here."""


class Expression:
    """An immutable sum: product -> coefficient, none of them zero."""

    __slots__ = ("terms",)

    def __init__(self, terms: Mapping[Product, Fraction]) -> None:
        kept = {product: factor for product, factor in terms.items() if factor}
        if len(kept) > MAX_TERMS or any(_bits(factor) > MAX_BITS for factor in kept.values()):
            raise NotComparable
        self.terms = kept

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Expression) and self.terms == other.terms

    def __hash__(self) -> int:
        return hash(frozenset(self.terms.items()))

    def __str__(self) -> str:
        return " + ".join(
            f"{factor}{''.join(f' {a}^{e}' for a, e in p)}" for p, factor in sorted(self.terms.items())
        )

    def __add__(self, other: Expression) -> Expression:
        terms = dict(self.terms)
        for product, factor in other.terms.items():
            terms[product] = terms.get(product, Fraction(0)) + factor
        return Expression(terms)

    def __neg__(self) -> Expression:
        return Expression({product: -factor for product, factor in self.terms.items()})

    def __sub__(self, other: Expression) -> Expression:
        return self + -other

    def __mul__(self, other: Expression) -> Expression:
        if len(self.terms) * len(other.terms) > MAX_TERMS * 4:
            raise NotComparable
        terms: dict[Product, Fraction] = {}
        for left, left_factor in self.terms.items():
            for right, right_factor in other.terms.items():
                product, factor = _multiplied(left, right)
                terms[product] = terms.get(product, Fraction(0)) + left_factor * right_factor * factor
        return Expression(terms)

    def __truediv__(self, other: Expression) -> Expression:
        return self * other.inverse()

    @property
    def rational(self) -> Fraction | None:
        """Its value where it is a fraction."""
        if not self.terms:
            return Fraction(0)
        return self.terms.get(()) if len(self.terms) == 1 else None

    @property
    def is_constant(self) -> bool:
        """Whether it is a real number: fractions, roots and pi."""
        return all(a.isdigit() or a in REAL_CONSTANTS for product in self.terms for a, _ in product)

    def inverse(self) -> Expression:
        """One over it; a sum with a root below the line is made rational, any other one is an atom.

        Raises:
            NotComparable: it is zero.
        """
        if not self.terms:
            raise NotComparable
        if len(self.terms) == 1:
            ((product, factor),) = self.terms.items()
            inverted, more = _normal({name: -exponent for name, exponent in product})
            return Expression({inverted: more / factor})
        if len(self.terms) == 2 and all(name.isdigit() or name == "i" for p in self.terms for name, _ in p):
            (first, a), (second, b) = self.terms.items()
            conjugate = Expression({first: a, second: -b})
            below = self * conjugate
            if below.rational:
                return conjugate * Expression({(): 1 / below.rational})
        _, leading = max(self.terms.items())
        monic = Expression({product: factor / leading for product, factor in self.terms.items()})
        return Expression({((f"({monic})", Fraction(-1)),): 1 / leading})

    def power(self, exponent: Fraction) -> Expression:
        """It to the power of a fraction.

        Raises:
            NotComparable: too high, or a root of a sum.
        """
        if exponent.denominator == 1:
            if abs(exponent) > MAX_POWER:
                raise NotComparable
            base = self if exponent >= 0 else self.inverse()
            return reduce(Expression.__mul__, [base] * abs(int(exponent)), number(1))
        if not self.terms:
            return self
        if len(self.terms) != 1:
            raise NotComparable
        ((product, factor),) = self.terms.items()
        atoms = {name: power * exponent for name, power in product}
        if "i" in atoms or (factor < 0 and exponent != _HALF):
            raise NotComparable
        for part, sign in ((abs(factor).numerator, 1), (abs(factor).denominator, -1)):
            for prime, times in _factors(part).items():
                atoms[str(prime)] = atoms.get(str(prime), Fraction(0)) + sign * times * exponent
        if factor < 0:
            atoms["i"] = Fraction(1)
        root, more = _normal(atoms)
        return Expression({root: more})


def number(value: Fraction | int) -> Expression:
    """A number as an expression."""
    return Expression({(): Fraction(value)})


def atom(name: str) -> Expression:
    """A name as an expression."""
    return Expression({((name, Fraction(1)),): Fraction(1)})


def _multiplied(left: Product, right: Product) -> tuple[Product, Fraction]:
    atoms = dict(left)
    for name, exponent in right:
        atoms[name] = atoms.get(name, Fraction(0)) + exponent
    return _normal(atoms)


def _normal(atoms: Mapping[str, Fraction]) -> tuple[Product, Fraction]:
    """The product with primes below the first power and i at most once, and the factor that this leaves outside."""
    factor, kept = Fraction(1), []
    for name, exponent in atoms.items():
        rest = exponent
        if name.isdigit():
            whole = exponent.__floor__()
            if abs(whole) > MAX_POWER * 4:
                raise NotComparable
            rest = exponent - whole
            factor *= Fraction(int(name)) ** whole
        elif name == "i" and exponent.denominator == 1:
            rest = Fraction(int(exponent) % 2)
            factor *= -1 if int(exponent) % 4 >= 2 else 1
        if rest:
            kept.append((name, rest))
    return tuple(sorted(kept)), factor


def _factors(value: int) -> dict[int, int]:
    if value > _MAX_UNDER_ROOT:
        raise NotComparable
    found: dict[int, int] = {}
    divisor = 2
    while divisor * divisor <= value:
        while value % divisor == 0:
            found[divisor] = found.get(divisor, 0) + 1
            value //= divisor
        divisor += 1
    if value > 1:
        found[value] = found.get(value, 0) + 1
    return found


def _bits(value: Fraction) -> int:
    return value.numerator.bit_length() + value.denominator.bit_length()
