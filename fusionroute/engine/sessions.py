"""Who is cached to where: the bookkeeping of an engine, without a tensor in sight.

A session is the list of tokens whose keys and values are cached. `SessionTable` decides whether a step may be fed
and from where, whom to evict for it, and keeps what has been fed. It runs in the engine's worker thread only.
"""

from __future__ import annotations

from collections.abc import Callable

from fusionroute.engine.session import Session, SessionView, StepCall
from fusionroute.engine.step_checks import check_fence, check_state, check_values
from fusionroute.errors import OutOfRoom, Reason

ROOM_GRANULE_TOKENS = 64
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
    ) -> None:
        self.kv_tokens = kv_tokens
        self.max_sessions = max_sessions
        self.max_session_tokens = min(max_context_tokens, kv_tokens)
        self.logits_width = logits_width
        self.epoch = epoch
        self.num_evictions = 0
        self.kv_tokens_used = 0
        self._free = free
        self._sessions: dict[str, Session] = {}  # least recently used first

    def __len__(self) -> int:
        return len(self._sessions)

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
        reserved = session.reserved_tokens if session else 0
        wanted = self._room_for(call.end_position, reserved)
        wanted = self._make_room(
            call.session_id, call.end_position, wanted, reserved, now, is_new=session is None
        )
        if session is None:
            session = self._sessions[call.session_id] = Session(call.session_id, now)
        if call.exact != session.exact:
            session.cut(0)
            session.exact = call.exact
        num_cached = min(session.num_equal(call.from_position, call.token_ids), call.num_spared)
        session.cut(call.from_position + num_cached)
        self._reserve(session, wanted)
        session.fence = call.fence
        session.busy = True
        self._touch(session, now)
        return session, num_cached

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
        length, reserved = session.cached_length + 1, session.reserved_tokens
        if length > self.max_session_tokens:
            return False
        if length <= reserved:
            return True
        wanted = self._room_for(length, reserved)
        try:
            wanted = self._make_room(session.session_id, length, wanted, reserved, now, is_new=False)
        except NoRoomYet:
            return False
        self._reserve(session, wanted)
        return True

    def needs_room(self, call: StepCall) -> bool:
        """Whether a step would take key-value memory or a session's place beyond what is reserved for it."""
        session = self._sessions.get(call.session_id)
        return session is None or call.end_position > session.reserved_tokens

    def end(self, session: Session, now: float) -> None:
        """The step of a session is over, well or badly."""
        session.busy = False
        self._touch(session, now)
        if session.close_when_idle:
            self._drop(session)

    def close(self, session_id: str, fence: int) -> bool:
        """Forgets a session, at once or when its running step has ended. Returns whether it existed."""
        session = self._sessions.get(session_id)
        if session is None:
            return False
        check_fence(session, fence)
        if session.busy:
            session.close_when_idle = True
        else:
            self._drop(session)
        return True

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
        """Tokens to reserve for a session of `length` tokens; doubling keeps the cost of copies linear."""
        if length <= reserved:
            return reserved
        generous = max(_round_up(length), min(2 * reserved, self.max_session_tokens))
        return min(generous, max(self.max_session_tokens, length))

    def _make_room(
        self, session_id: str, length: int, wanted: int, reserved: int, now: float, *, is_new: bool
    ) -> int:
        """Evicts idle sessions until `wanted` tokens fit, or as many as the step needs; returns what to reserve.

        Room beyond the step's need is worth the eviction of abandoned sessions, not of those that will be back soon.
        """
        free = self.kv_tokens - self.kv_tokens_used
        need_slot = is_new and len(self._sessions) >= self.max_sessions
        if wanted - reserved <= free and not need_slot:
            return wanted
        idle = [s for s in self._sessions.values() if not s.busy and s.session_id != session_id]
        evictable = sum(s.reserved_tokens for s in idle)
        abandoned = sum(s.reserved_tokens for s in idle if now - s.last_used > ABANDONED_SECONDS)
        if wanted - reserved > free + abandoned:
            wanted = max(reserved, min(wanted, _round_up(length)))
        if wanted - reserved > free + evictable:
            wanted = max(reserved, length)
        if wanted - reserved > free + evictable:
            raise NoRoomYet
        if need_slot and not idle:
            raise NoRoomYet
        for session in idle:
            if wanted - reserved <= free and not need_slot:
                break
            free += session.reserved_tokens
            need_slot = False
            self.num_evictions += 1
            self._drop(session)
        return wanted

    def _reserve(self, session: Session, num_tokens: int) -> None:
        self.kv_tokens_used += num_tokens - session.reserved_tokens
        session.reserved_tokens = num_tokens

    def _touch(self, session: Session, now: float) -> None:
        session.last_used = now
        self._sessions.pop(session.session_id, None)
        self._sessions[session.session_id] = session

    def _drop(self, session: Session) -> None:
        del self._sessions[session.session_id]
        self.kv_tokens_used -= session.reserved_tokens
        self._free(session.session_id)


def room_taken(kv_tokens: int) -> OutOfRoom:
    """The error for a step that waited in vain for room."""
    return OutOfRoom(
        Reason.KV_MEMORY_FULL,
        f"running sessions hold all key-value memory ({kv_tokens} tokens)",
        retry_after_seconds=0.5,
    )


def _round_up(length: int) -> int:
    return -(-length // ROOM_GRANULE_TOKENS) * ROOM_GRANULE_TOKENS
