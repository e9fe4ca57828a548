"""Who proposes the next tokens, and prompt lookup: what followed when the last tokens occurred before."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum

GRAM_TOKENS = (4, 3, 2)
"""Lookup tries the longest first; one token alone has followers of all kinds."""


class Drafter(Enum):
    """Who proposes tokens for router and experts to check."""

    ROUTER = "router"
    EXPERT = "expert"
    LOOKUP = "lookup"


class DraftingMode(Enum):
    """What an application asks for."""

    AUTO = "auto"
    OFF = "off"
    ROUTER = "router"
    EXPERT = "expert"
    LOOKUP = "lookup"

    @property
    def drafter(self) -> Drafter | None:
        """The drafter to use always; None where it is chosen, or where there is none."""
        return None if self in (DraftingMode.AUTO, DraftingMode.OFF) else Drafter(self.value)


@dataclass(frozen=True, slots=True)
class Plan:
    """How the next round is made.

    Attributes:
        drafter: who proposes tokens; None = nobody, the round gives one token.
        num_tokens: how many at most.
        least_probability: a model stops drafting before a token that it gives less than this.
        ids: of a lookup, the tokens proposed.
        early: ask the expert of the last token before the router has routed.
    """

    drafter: Drafter | None = None
    num_tokens: int = 0
    least_probability: float = 0.0
    ids: tuple[int, ...] = ()
    early: bool = False


PLAIN = Plan()
EARLY = Plan(early=True)


@dataclass(slots=True)
class Lookup:
    """Finds the latest earlier place where the text had its last few tokens; a token costs the same however long it is.

    Attributes:
        tokens: the text; whoever appends to it calls `note_last` before the next `propose`.
    """

    tokens: Sequence[int]
    _places: dict[tuple[int, ...], int] = field(default_factory=dict)
    _num_noted: int = 0

    def note_last(self) -> None:
        """Takes in the tokens that were appended since."""
        tokens, places = self.tokens, self._places
        for end in range(self._num_noted, len(tokens)):
            # A gram is entered once its follower is known, so that the end of the text does not find itself.
            for size in GRAM_TOKENS:
                if end >= size:
                    places[tuple(tokens[end - size : end])] = end
        self._num_noted = len(tokens)

    def propose(self, num_tokens: int) -> tuple[int, ...]:
        """What followed the last tokens before, at most so many; empty where they are new."""
        tokens = self.tokens
        length = len(tokens)
        for size in GRAM_TOKENS:
            if length > size:
                place = self._places.get(tuple(tokens[length - size :]))
                if place is not None:
                    return _repeated(tokens, place, num_tokens)
        return ()


def before_end(ids: tuple[int, ...], end_ids: frozenset[int]) -> tuple[int, ...]:
    """The ids before the first one that ends an answer: the round that checks them gives that one anyway."""
    for place, token_id in enumerate(ids):
        if token_id in end_ids:
            return ids[:place]
    return ids


def _repeated(tokens: Sequence[int], place: int, num_tokens: int) -> tuple[int, ...]:
    """`num_tokens` tokens from `place` on; where the text ends it goes on with itself, as repetitions do."""
    period = len(tokens) - place
    return tuple(tokens[place + index % period] for index in range(num_tokens))
