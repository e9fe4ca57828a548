"""Whose tokens are shared by whom, and what outlives its session for the next one to begin with.

A closed session stays as a donor: its memory is the first to be taken away, and never more than a share of all.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Protocol

from fusionroute.engine.prefixes import MOST_PARTS, Part, PartUse, PrefixIndex, clipped
from fusionroute.engine.session import Session, StepCall

MOST_BLOCK_TOKENS = 32
DONORS_SHARE = 8
"""Donors hold at most this fraction (one eighth) of the key-value memory."""


class Memory(Protocol):
    """What moves keys and values about; `KVCache` does."""

    def free(self, session_id: str) -> None: ...
    def rename(self, session_id: str, new_id: str) -> None: ...
    def split(
        self, session_id: str, part_id: str, stop: int, cached_length: int, capacity_tokens: int
    ) -> None: ...
    def build_upon(self, session_id: str, capacity_tokens: int, parts: Sequence[tuple[str, int]]) -> None: ...
    def copy(self, session_id: str, from_id: str, num_tokens: int, capacity_tokens: int) -> None: ...
    def free_part(self, part_id: str) -> None: ...


@dataclass(frozen=True, slots=True)
class Found:
    """Somebody has cached the first `num_tokens` tokens of a prompt."""

    holder: Session | Part
    num_tokens: int


class Sharing:
    """Parts and donors, and how much memory they hold beside the sessions.

    Args:
        memory: does what is decided here.
        shortest_tokens: fewer are computed again rather than shared; 0 = nothing is shared.
        most_donor_tokens: what donors may hold.

    Attributes:
        part_tokens: held by all parts.
        live_part_tokens: held by parts that a session builds upon, each counted once.
        donor_tokens: held by closed sessions, parts apart.
    """

    def __init__(self, memory: Memory, shortest_tokens: int, most_donor_tokens: int) -> None:
        self.part_tokens = self.live_part_tokens = self.donor_tokens = 0
        self._memory = memory
        self._shortest_tokens = shortest_tokens
        self._most_donor_tokens = most_donor_tokens
        self._index = PrefixIndex(max(1, min(MOST_BLOCK_TOKENS, shortest_tokens // 2)))
        self._donors: dict[str, Session] = {}
        self._parts: dict[str, Part] = {}
        self._ids = count()

    @property
    def is_on(self) -> bool:
        """Whether anything is shared."""
        return self._shortest_tokens > 0

    @property
    def idle_tokens(self) -> int:
        """Held for sessions that may come."""
        return self.donor_tokens + self.part_tokens - self.live_part_tokens

    def note(self, session: Session) -> None:
        """A session's tokens have changed at their end."""
        if self.is_on:
            self._index.note(session)

    def cut(self, session: Session, length: int) -> None:
        """Forgets a live session's tokens from `length` on, those that it shares too."""
        self._index.cut(session, length)
        session.cut(length)
        if length < session.num_shared:
            kept = clipped(session.parts, length)
            self._release(session.parts[len(kept) :])
            session.parts = kept

    def find(self, call: StepCall) -> Found | None:
        """Whose cached tokens a new session could begin with, if that is worth while."""
        if not self.is_on or call.num_spared < self._shortest_tokens:
            return None
        found = self._index.find(call.token_ids, call.num_spared, call.exact)
        if found is None:
            return None
        holder, num_tokens = found
        assert isinstance(holder, Session | Part)
        if not (self.is_donor(holder) or self._is_divisible(holder, num_tokens)):
            num_tokens = min(num_tokens, holder.num_shared)
        return Found(holder, num_tokens) if num_tokens >= self._shortest_tokens else None

    def is_donor(self, holder: Session | Part) -> bool:
        """Whether it is a closed session, which can be taken over as it is."""
        return isinstance(holder, Session) and holder.is_closed

    def begin(self, call: StepCall, found: Found, own_tokens: int, now: float) -> Session:
        """A new session that begins with what was found; memory for `own_tokens` more is reserved for it.

        A closed session is taken over, an exact one copied; of a live one the beginning becomes a part, of which both
        make use from then on.
        """
        session = Session(call.session_id, now, exact=call.exact)
        holder, length = found.holder, found.num_tokens
        session.extend(call.token_ids[:length])
        if isinstance(holder, Session) and holder.exact:
            self._memory.copy(call.session_id, holder.session_id, length, own_tokens)
        else:
            if isinstance(holder, Session) and length > holder.num_shared:
                self._split(holder, length, now)
            session.parts = clipped(_uses(holder), length)
            self._acquire(session.parts, now)
            ids = [(use.part.part_id, use.stop) for use in session.parts]
            self._memory.build_upon(call.session_id, own_tokens, ids)
        session.reserved_tokens = own_tokens
        self.note(session)
        return session

    def take_over(self, call: StepCall, found: Found) -> Session:
        """The closed session that was found, cut to what is common, as the call's own; with what is reserved for it."""
        donor = found.holder
        assert isinstance(donor, Session)
        del self._donors[donor.session_id]
        self.donor_tokens -= donor.reserved_tokens
        self._memory.rename(donor.session_id, call.session_id)
        donor.session_id, donor.is_closed, donor.close_when_idle = call.session_id, False, False
        self._acquire(donor.parts, donor.last_used, num_users=0)
        self.cut(donor, found.num_tokens)
        return donor

    def retire(self, session: Session) -> bool:
        """Makes a donor of a session that is closed, under another name; False if it has to be dropped instead."""
        is_worth_it = self._shortest_tokens <= session.cached_length and not session.leaves_nothing
        if not self.is_on or not is_worth_it or session.reserved_tokens > self._most_donor_tokens:
            return False
        name = f"closed/{next(self._ids)}"
        self._memory.rename(session.session_id, name)
        session.session_id, session.is_closed = name, True
        self._donors[name] = session
        self.donor_tokens += session.reserved_tokens
        self._release(session.parts, num_users=0)
        while self.idle_tokens > self._most_donor_tokens and self.drop_oldest(()):
            pass
        return True

    def forget(self, session: Session) -> None:
        """A live session is gone, and its own memory with it."""
        self._index.cut(session, 0)
        self._release(session.parts)
        session.parts = ()

    def drop_oldest(self, but: Container[object]) -> bool:
        """Gives the memory of the donor back that was used longest ago; False if there is none besides `but`."""
        donors: Iterable[Session | Part] = [
            *self._donors.values(),
            *(part for part in self._parts.values() if not part.num_users),
        ]
        oldest = min(
            (each for each in donors if each not in but), key=lambda each: each.last_used, default=None
        )
        if oldest is None:
            return False
        self._index.cut(oldest, 0)
        if isinstance(oldest, Part):
            del self._parts[oldest.part_id]
            self.part_tokens -= oldest.num_tokens
            for use in oldest.before:
                use.part.num_users -= 1
            self._memory.free_part(oldest.part_id)
            return True
        del self._donors[oldest.session_id]
        self.donor_tokens -= oldest.reserved_tokens
        for use in oldest.parts:
            use.part.num_users -= 1
        self._memory.free(oldest.session_id)
        return True

    def freeable_tokens(self, kept: Iterable[Session], but: Container[object]) -> int:
        """What donors and parts could give back if only the sessions `kept` stayed."""
        needed = {id(use.part) for session in kept for use in session.parts}
        held: list[Session | Part] = [*self._donors.values(), *self._parts.values()]
        for each in held:
            if each in but:
                needed.update(id(use.part) for use in _uses(each))
        parts = sum(part.num_tokens for part in self._parts.values() if id(part) not in needed)
        return parts + sum(donor.reserved_tokens for donor in self._donors.values() if donor not in but)

    def _is_divisible(self, holder: Session | Part, num_tokens: int) -> bool:
        """Whether the first tokens of a holder are a part, or are worth to become one."""
        if isinstance(holder, Part) or holder.exact or num_tokens <= holder.num_shared:
            return True
        return num_tokens - holder.num_shared >= self._shortest_tokens and len(holder.parts) < MOST_PARTS

    def _split(self, holder: Session, stop: int, now: float) -> None:
        """Turns a live session's own tokens below `stop` into a part."""
        part = Part(
            f"part/{next(self._ids)}",
            holder.num_shared,
            holder.tokens[:stop],
            holder.digests[: stop + 1],
            holder.parts,
            now,
        )
        left = holder.reserved_tokens - part.num_tokens
        self._memory.split(holder.session_id, part.part_id, stop, holder.cached_length, left)
        holder.reserved_tokens = left
        for use in holder.parts:
            use.part.num_users += 1
        self._parts[part.part_id] = part
        self.part_tokens += part.num_tokens
        own = PartUse(part, stop)
        holder.parts = (*holder.parts, own)
        self._acquire((own,), now)
        self._index.cut(holder, 0)
        self._index.note(holder)
        self._index.note(part)  # the last to be noted is the one that is found

    def _acquire(self, uses: Iterable[PartUse], now: float, num_users: int = 1) -> None:
        for use in uses:
            use.part.num_users += num_users
            use.part.last_used = now
            self.live_part_tokens += use.part.num_tokens if not use.part.num_live else 0
            use.part.num_live += 1

    def _release(self, uses: Iterable[PartUse], num_users: int = 1) -> None:
        for use in uses:
            use.part.num_users -= num_users
            use.part.num_live -= 1
            self.live_part_tokens -= use.part.num_tokens if not use.part.num_live else 0


def _uses(holder: Session | Part) -> tuple[PartUse, ...]:
    if isinstance(holder, Part):
        return (*holder.before, PartUse(holder, len(holder.tokens)))
    return holder.parts
