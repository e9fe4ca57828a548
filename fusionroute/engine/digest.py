"""The rolling digest by which caller and expert check that they mean the same tokens.

``d_0 = 0xcbf29ce484222325`` and ``d_{p+1} = ((d_p xor (token_p + 1)) * 0x9e3779b97f4a7c15 mod 2^64)`` with the
upper half folded into the lower one (``d xor (d >> 32)``). It guards against mistakes, not against attackers.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

EMPTY = 0xCBF29CE484222325
_MULTIPLIER = 0x9E3779B97F4A7C15
_MASK = (1 << 64) - 1


def digest(token_ids: Iterable[int], start: int = EMPTY) -> int:
    """Digest of the tokens that led to `start`, followed by `token_ids`."""
    value = start
    for token in token_ids:
        value = ((value ^ (token + 1)) * _MULTIPLIER) & _MASK
        value ^= value >> 32
    return value


def rolling(token_ids: Iterable[int], start: int) -> Iterator[int]:
    """The digest after each of `token_ids`."""
    value = start
    for token in token_ids:
        value = ((value ^ (token + 1)) * _MULTIPLIER) & _MASK
        value ^= value >> 32
        yield value
