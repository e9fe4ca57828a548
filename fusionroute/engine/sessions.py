"""Who is cached to where: the bookkeeping of an engine, without a tensor in sight.

A session is the list of tokens whose keys and values are cached. `SessionTable` decides whether a step may be fed
and from where, whom to evict for it, and keeps what has been fed. It runs in the engine's worker thread only.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence
from contextlib import suppress
from typing import Never

from fusionroute.engine.session import Closing, Session, SessionView, StepCall
from fusionroute.engine.sharing import Found, Sharing
from fusionroute.engine.step_checks import check_fence, check_state, check_values
from fusionroute.errors import OutOfRoom, Reason, SessionStateError

ROOM_GRANULE_TOKENS = 16
GROWTH_SHARE = 16
"""A session that grows takes a sixteenth more than it has: what is reserved and not used is a few per cent."""
ABANDONED_SECONDS = 5.0
"""A session that nobody has used for so long is not in the middle of an answer."""


class NoRoomYet(Exception):
    """Sessions that are being computed hold the room; it comes free by itself."""


class SessionTable:
    """The sessions of one engine within a budget of key-value tokens.

    Args:
        kv_tokens: tokens for which there is key-value memory.
        max_sessions: sessions cached at a time.
        max_context_tokens: longest session.
        logits_width: ids below this are known to the model.
        epoch: of the weights that serve.
        free: called with the id of every session whose memory is given back.
        sharing: what sessions share; None = nothing.
        forget: called with the id of every session that is no more, even if its memory stays for others.
    """

    def __init__(
        self,
        *,
        kv_tokens: int,
        max_sessions: int,
        max_context_tokens: int,
        logits_width: int,
        epoch: int,
        free: Callable[[str], None],
        sharing: Sharing | None = None,
        forget: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.kv_tokens = kv_tokens
        self.max_sessions = max_sessions
        self.max_session_tokens = min(max_context_tokens, kv_tokens)
        self.logits_width = logits_width
        self.epoch = epoch
        self.num_evictions = 0
        self._own_tokens = 0  # of all sessions
        self._free, self._forget = free, forget
        self._sharing = sharing or Sharing(_Unmoved(), 0, 0)
        self._sessions: dict[str, Session] = {}  # least recently used first

    def __len__(self) -> int:
        return len(self._sessions)

    @property
    def kv_tokens_used(self) -> int:
        """Tokens for which sessions hold memory, shared ones once. What is kept for sessions to come counts as free."""
        return self._own_tokens + self._sharing.live_part_tokens

    @property
    def _num_free(self) -> int:
        return self.kv_tokens - self._own_tokens - self._sharing.part_tokens - self._sharing.donor_tokens

    def begin(self, call: StepCall, now: float) -> tuple[Session, int]:
        """Readies a session for a step: cuts it back, makes room, marks it busy.

        Returns the session and how many of the call's tokens need no computing because they are cached. Until the
        session is certain to be fed, nothing about it changes.

        Raises:
            InvalidRequest, SessionStateError: as the truth table of the Step call says.
            NoRoomYet: try again once a running step has ended.
            OutOfRoom: never for want of key-value memory, which is NoRoomYet.
        """
        session = self.check(call)
        found = self._sharing.find(call) if session is None else None
        if found is not None:
            session = self._begin_shared(call, found, now)
            num_cached = session.cached_length
        else:
            session, num_cached = self._begin_alone(call, session, now)
        session.fence = call.fence
        session.busy = True
        self._touch(session, now)
        return session, num_cached

    def _begin_alone(self, call: StepCall, session: Session | None, now: float) -> tuple[Session, int]:
        num_cached = 0
        if session is not None and session.exact == call.exact:
            num_cached = min(session.num_equal(call.from_position, call.token_ids), call.num_spared)
        length = call.from_position + num_cached
        num_shared = min(session.num_shared, length) if session else 0
        reserved = session.reserved_tokens if session else 0
        own_tokens = call.end_position - num_shared
        wanted = self._room_for(own_tokens, reserved)
        wanted = self._make_room(own_tokens, wanted, reserved, now, is_new=session is None, but=(session,))
        if session is None:
            session = Session(call.session_id, now, exact=call.exact)
        self._sharing.cut(session, length)
        session.exact = call.exact
        self._reserve(session, wanted)
        return session, num_cached

    def _begin_shared(self, call: StepCall, found: Found, now: float) -> Session:
        """A session that begins with what another one has cached."""
        holder, length = found.holder, found.num_tokens
        if isinstance(holder, Session) and (holder.is_closed or holder.exact):
            num_shared = min(holder.num_shared, length)
        else:
            num_shared = length
        own_tokens = call.end_position - num_shared
        wanted = _round_up(own_tokens)
        reserved = 0
        if isinstance(holder, Session) and holder.is_closed:
            reserved = holder.reserved_tokens
        wanted = self._make_room(own_tokens, wanted, reserved, now, is_new=True, but=(holder,))
        if not reserved:
            before = holder.reserved_tokens if isinstance(holder, Session) else 0
            session = self._sharing.begin(call, found, wanted, now)
            after = holder.reserved_tokens if isinstance(holder, Session) else 0
            self._own_tokens += wanted - (before - after)  # what became a part is the holder's own no more
            return session
        session = self._sharing.take_over(call, found)
        self._own_tokens += session.reserved_tokens
        self._reserve(session, wanted)
        return session

    def check(self, call: StepCall) -> Session | None:
        """The session of a step that may touch it; None where it is new. Raises as `begin` does."""
        check_values(call, self.max_session_tokens, self.logits_width, self.epoch)
        session = self._sessions.get(call.session_id)
        check_state(call, session)
        return session

    def touch(self, call: StepCall, now: float) -> None:
        """A step was answered without feeding its session."""
        session = self._sessions[call.session_id]
        session.fence = call.fence
        self._touch(session, now)

    def can_go_on(self, session: Session, now: float) -> bool:
        """Whether a busy session may be fed one token more; its room is made."""
        if session.cached_length >= self.max_session_tokens:
            return False
        length, reserved = session.cached_length + 1 - session.num_shared, session.reserved_tokens
        if length <= reserved:
            return True
        wanted = self._room_for(length, reserved)
        try:
            wanted = self._make_room(length, wanted, reserved, now, is_new=False, but=(session,))
        except NoRoomYet:
            return False
        self._reserve(session, wanted)
        return True

    def needs_room(self, call: StepCall) -> bool:
        """Whether a step would take key-value memory or a session's place beyond what is reserved for it."""
        session = self._sessions.get(call.session_id)
        if session is None:
            return True
        return call.end_position - min(session.num_shared, call.from_position) > session.reserved_tokens

    def extend(self, session: Session, token_ids: Sequence[int]) -> None:
        """Remembers tokens that have been fed."""
        session.extend(token_ids)
        self._sharing.note(session)

    def end(self, session: Session, now: float) -> None:
        """The step of a session is over, well or badly."""
        session.busy = False
        self._touch(session, now)
        if session.close_when_idle:
            self._close(session)

    def close(self, session_id: str, fence: int, *, for_good: bool = False) -> bool:
        """Forgets a session, at once or when its running step has ended. Returns whether it existed.

        Args:
            for_good: other sessions are not to begin with its tokens either.
        """
        session = self._sessions.get(session_id)
        if session is None:
            return False
        check_fence(session, fence)
        session.leaves_nothing |= for_good
        if session.busy:
            session.close_when_idle = True
        else:
            self._close(session)
        return True

    def close_all(self, closings: Sequence[Closing]) -> None:
        """Forgets those of the sessions that nobody with a higher fence goes on with."""
        for each in closings:
            with suppress(SessionStateError):
                self.close(each.session_id, each.fence, for_good=each.for_good)

    def views(self, limit: int, now: float) -> list[SessionView]:
        """The sessions, most recently used first."""
        views: list[SessionView] = []
        for session in reversed(self._sessions.values()):
            if len(views) >= limit:
                break
            views.append(
                SessionView(
                    session.session_id,
                    session.cached_length,
                    session.reserved_tokens,
                    max(0.0, now - session.last_used),
                    session.busy,
                    session.fence,
                )
            )
        return views

    def _room_for(self, length: int, reserved: int) -> int:
        """Tokens to reserve for `length` of a session's own; growth by shares keeps copies few and room used."""
        if length <= reserved:
            return reserved
        share = (reserved + reserved // GROWTH_SHARE) // ROOM_GRANULE_TOKENS * ROOM_GRANULE_TOKENS
        generous = max(_round_up(length), share)
        return max(length, min(generous, self.max_session_tokens))

    def _make_room(
        self, length: int, wanted: int, reserved: int, now: float, *, is_new: bool, but: Container[object]
    ) -> int:
        """Evicts idle sessions until `wanted` tokens fit, or as many as the step needs; returns what to reserve.

        What is kept for sessions to come goes first. Room beyond the step's need is worth the eviction of abandoned
        sessions, not of those that will be back soon.
        """
        sharing = self._sharing
        need_slot = is_new and len(self._sessions) >= self.max_sessions
        if wanted - reserved <= self._num_free and not need_slot:
            return wanted
        idle = [s for s in self._sessions.values() if not s.busy and s not in but]
        kept = [s for s in self._sessions.values() if s.busy or s in but]
        free = self._num_free
        evictable = free + sum(s.reserved_tokens for s in idle) + sharing.freeable_tokens(kept, but)
        recent = [s for s in idle if now - s.last_used <= ABANDONED_SECONDS]
        abandoned = sum(s.reserved_tokens for s in idle if now - s.last_used > ABANDONED_SECONDS)
        if wanted - reserved > free + abandoned + sharing.freeable_tokens([*kept, *recent], but):
            wanted = max(reserved, min(wanted, _round_up(length)))
        if wanted - reserved > evictable:
            wanted = max(reserved, length)
        if wanted - reserved > evictable or (need_slot and not idle):
            raise NoRoomYet
        while wanted - reserved > self._num_free and sharing.drop_oldest(but):
            pass
        for session in idle:
            if wanted - reserved <= self._num_free and not need_slot:
                break
            need_slot = False
            self.num_evictions += 1
            self._drop(session)
            while wanted - reserved > self._num_free and sharing.drop_oldest(but):
                pass
        return wanted

    def _reserve(self, session: Session, num_tokens: int) -> None:
        self._own_tokens += num_tokens - session.reserved_tokens
        session.reserved_tokens = num_tokens

    def _touch(self, session: Session, now: float) -> None:
        session.last_used = now
        self._sessions.pop(session.session_id, None)
        self._sessions[session.session_id] = session

    def _close(self, session: Session) -> None:
        session_id, reserved = session.session_id, session.reserved_tokens
        if not self._sharing.retire(session):
            self._drop(session)
            return
        del self._sessions[session_id]
        self._own_tokens -= reserved
        self._forget(session_id)

    def _drop(self, session: Session) -> None:
        del self._sessions[session.session_id]
        self._own_tokens -= session.reserved_tokens
        self._sharing.forget(session)
        self._free(session.session_id)
        self._forget(session.session_id)


class _Unmoved:
    """The memory of a table whose sessions share nothing."""

    def __getattr__(self, name: str) -> Never:
        raise AssertionError(f"{name}: nothing is shared")


def room_taken(kv_tokens: int) -> OutOfRoom:
    """The error for a step that waited in vain for room."""
    return OutOfRoom(
        Reason.KV_MEMORY_FULL,
        f"running sessions hold all key-value memory ({kv_tokens} tokens)",
        retry_after_seconds=0.5,
    )


def _round_up(length: int) -> int:
    return -(-length // ROOM_GRANULE_TOKENS) * ROOM_GRANULE_TOKENS
