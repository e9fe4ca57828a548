"""Who is cached to where: the bookkeeping of an engine, without a tensor in sight.

A session is the list of tokens whose keys and values are cached. `SessionTable` decides whether a step may be fed
and from where, whom to evict for it, and keeps what has been fed. It runs in the engine's worker thread only.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from fusionroute.engine import digest
from fusionroute.errors import InvalidRequest, OutOfRoom, Reason, SessionStateError
from fusionroute.fusion import Sampling

ROOM_GRANULE_TOKENS = 64
ABANDONED_SECONDS = 5.0
"""A session that nobody has used for so long is not in the middle of an answer."""


@dataclass(frozen=True, slots=True)
class Draft:
    """Tokens by which a model is to continue a session; they stay in its cache until a later step cuts them back.

    Attributes:
        num_tokens: at most so many.
        sampling: how each is chosen from the model's own row.
        min_probability: the draft ends before a token whose probability is lower.
    """

    num_tokens: int
    sampling: Sampling = Sampling()  # noqa: RUF009 - frozen
    min_probability: float = 0.0


@dataclass(frozen=True, slots=True)
class StepCall:
    """Tokens to feed to a session and the rows wanted of them.

    Attributes:
        session_id: whose tokens these are.
        from_position: position of the first token in the session.
        token_ids: at least one id, each in [0, logits width).
        num_rows: logits rows wanted, those of the last tokens; 0 to len(token_ids).
        expected_epoch: the epoch that must serve; 0 accepts any.
        fence: the caller's fencing token.
        prefix_digest: digest of the tokens before from_position; None is not checked.
        deadline: on the clock of time.monotonic(), in seconds; expired work is dropped before the forward.
        row_indices: instead of num_rows: ascending indices into token_ids whose rows are wanted.
        exact: rows are to be the same bits however steps are batched, chunked, repeated or drafted.
        draft: the model is to go on by itself.
    """

    session_id: str
    from_position: int
    token_ids: Sequence[int]
    num_rows: int
    expected_epoch: int = 0
    fence: int = 0
    prefix_digest: int | None = None
    deadline: float | None = None
    row_indices: Sequence[int] = ()
    exact: bool = False
    draft: Draft | None = None

    @property
    def end_position(self) -> int:
        """Cached length after the step."""
        return self.from_position + len(self.token_ids)


@dataclass(slots=True)
class Session:
    """A session's cached tokens and who may touch them."""

    session_id: str
    last_used: float
    fence: int = 0
    reserved_tokens: int = 0
    busy: bool = False
    close_when_idle: bool = False
    tokens: array[int] = field(default_factory=lambda: array("I"))
    digests: array[int] = field(default_factory=lambda: array("Q", [digest.EMPTY]))

    @property
    def cached_length(self) -> int:
        """Tokens whose keys and values are cached."""
        return len(self.tokens)

    def cut(self, length: int) -> None:
        """Forgets the tokens from position `length` on."""
        del self.tokens[length:]
        del self.digests[length + 1 :]

    def extend(self, token_ids: Sequence[int]) -> None:
        """Remembers tokens that have been fed."""
        self.digests.extend(digest.rolling(token_ids, self.digests[-1]))
        self.tokens.extend(token_ids)

    def num_equal(self, from_position: int, token_ids: Sequence[int]) -> int:
        """How many of `token_ids` equal the cached tokens from `from_position` on."""
        cached = self.tokens[from_position : from_position + len(token_ids)]
        for count, (mine, theirs) in enumerate(zip(cached, token_ids, strict=False)):
            if mine != theirs:
                return count
        return len(cached)


@dataclass(frozen=True, slots=True)
class SessionView:
    """A session as others see it."""

    session_id: str
    cached_length: int
    kv_tokens_reserved: int
    idle_seconds: float
    busy: bool
    fence: int


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
        self.check_values(call)
        session = self._sessions.get(call.session_id)
        self._check_state(call, session)
        reserved = session.reserved_tokens if session else 0
        wanted = self._room_for(call.end_position, reserved)
        wanted = self._make_room(call, wanted, reserved, now, is_new=session is None)
        if session is None:
            session = self._sessions[call.session_id] = Session(call.session_id, now)
        num_cached = min(
            session.num_equal(call.from_position, call.token_ids), len(call.token_ids) - call.num_rows
        )
        session.cut(call.from_position + num_cached)
        self.kv_tokens_used += wanted - session.reserved_tokens
        session.reserved_tokens = wanted
        session.fence = call.fence
        session.busy = True
        self._touch(session, now)
        return session, num_cached

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
        self._check_fence(session, fence)
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

    def check_values(self, call: StepCall) -> None:
        """Rejects what no session could be fed."""
        num_tokens = len(call.token_ids)
        if num_tokens == 0:
            raise _invalid("token_ids", "[]", "at least one token")
        if not 0 <= call.num_rows <= num_tokens:
            raise _invalid("num_rows", call.num_rows, f"0 to {num_tokens}, the number of token_ids")
        if call.from_position < 0:
            raise _invalid("from_position", call.from_position, "0 or more")
        if call.end_position > self.max_session_tokens:
            raise InvalidRequest(
                Reason.CONTEXT_FULL,
                f"from_position {call.from_position} + {num_tokens} tokens = {call.end_position} is longer than"
                f" the longest session, {self.max_session_tokens} tokens",
                metadata={"limit": str(self.max_session_tokens)},
            )
        lowest, highest = min(call.token_ids), max(call.token_ids)
        if lowest < 0 or highest >= self.logits_width:
            bad = lowest if lowest < 0 else highest
            raise InvalidRequest(
                Reason.TOKEN_OUT_OF_RANGE,
                f"token_ids contains {bad}; ids go from 0 to {self.logits_width - 1}",
                metadata={"limit": str(self.logits_width - 1)},
            )
        if call.expected_epoch and call.expected_epoch != self.epoch:
            raise SessionStateError(
                Reason.EPOCH_MISMATCH,
                f"expected_epoch {call.expected_epoch} does not serve here, epoch {self.epoch} does",
                metadata={"epoch": str(self.epoch)},
            )

    def _check_state(self, call: StepCall, session: Session | None) -> None:
        if session is None:
            if call.from_position > 0:
                raise SessionStateError(
                    Reason.SESSION_UNKNOWN,
                    f"session {call.session_id!r} is not cached; send its tokens from position 0",
                    metadata={"cached_length": "0"},
                )
            return
        self._check_fence(session, call.fence)
        if session.busy:
            raise SessionStateError(
                Reason.SESSION_BUSY,
                f"another step of session {call.session_id!r} is running",
                retry_after_seconds=0.05,
            )
        if call.from_position > session.cached_length:
            raise SessionStateError(
                Reason.POSITION_AHEAD,
                f"from_position {call.from_position} is ahead of the {session.cached_length} cached tokens of session"
                f" {call.session_id!r}",
                metadata={"cached_length": str(session.cached_length)},
            )
        if call.prefix_digest is not None and call.prefix_digest != session.digests[call.from_position]:
            raise SessionStateError(
                Reason.DIGEST_MISMATCH,
                f"the first {call.from_position} cached tokens of session {call.session_id!r} are not those of the"
                " caller; send the tokens from position 0",
                metadata={"cached_length": str(session.cached_length)},
            )

    @staticmethod
    def _check_fence(session: Session, fence: int) -> None:
        if fence < session.fence:
            raise SessionStateError(
                Reason.STALE_FENCE,
                f"fence {fence} is below {session.fence}: session {session.session_id!r} has a newer owner",
                metadata={"fence": str(session.fence)},
            )

    def _room_for(self, length: int, reserved: int) -> int:
        """Tokens to reserve for a session of `length` tokens; doubling keeps the cost of copies linear."""
        if length <= reserved:
            return reserved
        generous = max(_round_up(length), min(2 * reserved, self.max_session_tokens))
        return min(generous, max(self.max_session_tokens, length))

    def _make_room(self, call: StepCall, wanted: int, reserved: int, now: float, *, is_new: bool) -> int:
        """Evicts idle sessions until `wanted` tokens fit, or as many as the step needs; returns what to reserve.

        Room beyond the step's need is worth the eviction of abandoned sessions, not of those that will be back soon.
        """
        length = call.end_position
        free = self.kv_tokens - self.kv_tokens_used
        need_slot = is_new and len(self._sessions) >= self.max_sessions
        if wanted - reserved <= free and not need_slot:
            return wanted
        idle = [s for s in self._sessions.values() if not s.busy and s.session_id != call.session_id]
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


def _invalid(name: str, value: object, limit: str) -> InvalidRequest:
    return InvalidRequest(
        Reason.INVALID_FIELD, f"{name} = {value} is not allowed: {limit}", metadata={"field": name}
    )


def _round_up(length: int) -> int:
    return -(-length // ROOM_GRANULE_TOKENS) * ROOM_GRANULE_TOKENS
