"""Which cached tokens a new session may share: parts of prompts that several sessions begin with.

    system prompt ---- part 1 ----+---- own of session a
                                  +---- part 2 ----+---- own of session b
                                                   +---- own of session c

A part is immutable, and counted once however many sessions build upon it. It is found by the digests of whole blocks
of tokens, and believed only after the tokens themselves were compared.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from fusionroute.engine.digest import EMPTY, rolling

MOST_PARTS = 3
"""Attention visits each part by itself: beyond so many, sharing more would cost more than it spares."""

_EXACT = 0xA5A5A5A5A5A5A5A5


@dataclass(slots=True, eq=False)
class Part:
    """Tokens [start, len(tokens)) of several sessions.

    Attributes:
        part_id: names its memory.
        tokens: from position 0 on, so the last of them are its own.
        before: the parts that it builds upon.
        num_users: sessions, donors and further parts that build upon it.
        num_live: sessions that build upon it.
        last_used: when one of them began or ended.
    """

    part_id: str
    start: int
    tokens: array[int]
    digests: array[int]
    before: tuple[PartUse, ...]
    last_used: float
    num_users: int = 0
    num_live: int = 0
    num_indexed: int = 0
    exact: bool = False

    @property
    def num_tokens(self) -> int:
        """Tokens for which it holds memory."""
        return len(self.tokens) - self.start

    @property
    def first_own(self) -> int:
        """Position of the first of its own tokens."""
        return self.start

    @property
    def num_shared(self) -> int:
        """All of its tokens."""
        return len(self.tokens)


@dataclass(frozen=True, slots=True)
class PartUse:
    """The tokens [part.start, stop) of a part."""

    part: Part
    stop: int


def clipped(uses: tuple[PartUse, ...], length: int) -> tuple[PartUse, ...]:
    """What is used of parts by the first `length` tokens."""
    return tuple(PartUse(use.part, min(use.stop, length)) for use in uses if use.part.start < length)


class Holder(Protocol):
    """A session or a part: cached tokens and the digest before each of them."""

    exact: bool
    num_indexed: int

    @property
    def tokens(self) -> array[int]: ...

    @property
    def digests(self) -> array[int]: ...

    @property
    def first_own(self) -> int:
        """Position of the first token that nobody else holds for it."""


@dataclass(slots=True)
class PrefixIndex:
    """Finds who has cached the first tokens of a prompt.

    Attributes:
        block_tokens: prefixes are known at multiples of this length.
    """

    block_tokens: int
    _holders: dict[int, Holder] = field(default_factory=dict)

    def note(self, holder: Holder) -> None:
        """A holder's tokens have changed at their end."""
        num_blocks = len(holder.tokens) // self.block_tokens
        holder.num_indexed = max(holder.num_indexed, holder.first_own // self.block_tokens)
        while holder.num_indexed < num_blocks:
            holder.num_indexed += 1
            self._holders[self._key(holder, holder.num_indexed)] = holder

    def cut(self, holder: Holder, length: int) -> None:
        """A holder is about to lose its tokens from `length` on."""
        while holder.num_indexed * self.block_tokens > length:
            key = self._key(holder, holder.num_indexed)
            if self._holders.get(key) is holder:
                del self._holders[key]
            holder.num_indexed -= 1

    def find(self, token_ids: Sequence[int], most: int, exact: bool) -> tuple[Holder, int] | None:
        """Who has cached the longest beginning of `token_ids`, at most `most` of them, and how many tokens."""
        if most < self.block_tokens or not self._holders:
            return None
        wanted = array("I", token_ids[:most])
        salt = _EXACT if exact else 0
        blocks = list(rolling(wanted, EMPTY))[self.block_tokens - 1 :: self.block_tokens]
        for count in range(len(blocks), 0, -1):
            holder = self._holders.get(blocks[count - 1] ^ salt)
            if holder is None or holder.exact != exact:
                continue
            length = num_equal(holder.tokens, wanted)
            if length >= count * self.block_tokens:
                return holder, length
        return None

    def _key(self, holder: Holder, num_blocks: int) -> int:
        return holder.digests[num_blocks * self.block_tokens] ^ (_EXACT if holder.exact else 0)


def num_equal(mine: array[int], theirs: array[int]) -> int:
    """How many tokens two texts begin with in common."""
    low, high = 0, min(len(mine), len(theirs))
    if mine[:high] == theirs[:high]:
        return high
    while low < high:  # mine[:low] == theirs[:low]; they differ somewhere in [low, high)
        middle = (low + high + 1) // 2
        if mine[low:middle] == theirs[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
