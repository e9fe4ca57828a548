"""What the store knows of a session, as values."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from fusionroute.errors import InternalFault, Reason
from router_service.records import Records, unpack


class SessionState(Enum):
    """Where the latest turn of a session stands."""

    EMPTY = "empty"
    """No turn was begun yet."""
    RUNNING = "running"
    """A turn is being written, or was when its writer vanished."""
    FINISHED = "finished"
    """The latest turn is complete."""


class FinishReason(Enum):
    """Why a turn ended."""

    EOS = "eos"
    STOP = "stop"
    LENGTH = "length"
    CANCELLED = "cancelled"
    CONTEXT = "context"


class WriteVerdict(Enum):
    """What became of a write that the fence allowed."""

    DONE = "done"
    """The session holds these bytes at this position, by this call or by an earlier one."""
    GAP = "gap"
    """The session ends before this position."""
    CONFLICT = "conflict"
    """The session holds other tokens at this position; they stay."""


@dataclass(frozen=True, slots=True)
class Lease:
    """The right to write a session, for as long as `fence` is the session's."""

    session_id: str
    owner: str
    fence: int
    length: int
    """Tokens that the session held when the lease was granted."""
    ttl_seconds: float | None = None
    """How long after its last write the session is forgotten; None = as sessions are."""


@dataclass(frozen=True, slots=True)
class WriteOutcome:
    """Answer to a write or renewal."""

    verdict: WriteVerdict
    length: int
    """Tokens that the session holds now."""
    cancel_requested: bool = False
    """Somebody has asked for the end of this turn."""


@dataclass(frozen=True, slots=True)
class TurnParameters:
    """All that an answer is a function of, besides the tokens before it."""

    seed: int
    combine: str
    checkpoint: str
    """Fingerprint of the router checkpoint."""
    sampling: Mapping[str, Any] = field(default_factory=dict)
    """Whatever else the writer needs to go on with the turn; stored as JSON."""


@dataclass(frozen=True, slots=True)
class OpenTurn:
    """A turn that is being written, as the store has to know it."""

    request_id: str
    """Never empty: drawn where the request gave none."""
    answer_position: int
    parameters: TurnParameters


@dataclass(frozen=True, slots=True)
class TurnBegun:
    """Answer to `begin_turn`."""

    is_new: bool
    """False: this request id began a turn earlier, which stands as it is; follow or continue that one."""
    answer_position: int
    length: int


@dataclass(frozen=True, slots=True)
class StoredTurn:
    """The latest turn of a session."""

    request_id: str
    answer_position: int
    parameters: TurnParameters
    finish_reason: FinishReason | None
    stop: str
    """The stop string that ended it, or empty."""
    cancel_requested: bool


@dataclass(frozen=True, slots=True)
class StoredSession:
    """What is known of a session."""

    session_id: str
    state: SessionState
    turn: StoredTurn | None
    fence: int
    length: int
    """Tokens in the store, prompts included."""
    from_position: int
    records: Records
    """The tokens from `from_position` on."""
    expires_in_seconds: float
    lease_remaining_seconds: float
    """0 when no writer is alive."""

    @property
    def is_being_written(self) -> bool:
        """Whether a writer holds the session."""
        return self.lease_remaining_seconds > 0


@dataclass(frozen=True, slots=True)
class CancelOutcome:
    """Answer to `cancel`."""

    was_running: bool
    writer_is_alive: bool
    """False: nobody is there to stop; acquire the session and finish the turn yourself."""


def parse_session(session_id: str, from_position: int, answer: Sequence[Any]) -> StoredSession:
    """The session that `scripts/read.lua` answered with.

    Raises:
        InternalFault: fewer tokens are stored than the turn began with.
    """
    _, pairs, length, records, ttl_ms, lease_ms = answer
    fields = {pairs[i].decode(): pairs[i + 1].decode() for i in range(0, len(pairs), 2)}
    turn = _parse_turn(fields) if "request_id" in fields else None
    if turn is not None and turn.answer_position > length:
        message = f"session {session_id} has lost tokens: {length} are left of {turn.answer_position} or more"
        raise InternalFault(Reason.INTERNAL, message)
    return StoredSession(
        session_id=session_id,
        state=SessionState(fields.get("state", "empty")),
        turn=turn,
        fence=int(fields["fence"]),
        length=int(length),
        from_position=from_position,
        records=unpack(records),
        expires_in_seconds=max(int(ttl_ms), 0) / 1000,
        lease_remaining_seconds=int(lease_ms) / 1000,
    )


def _parse_turn(fields: Mapping[str, str]) -> StoredTurn:
    reason = fields.get("finish_reason")
    return StoredTurn(
        request_id=fields["request_id"],
        answer_position=int(fields["answer_position"]),
        parameters=TurnParameters(
            seed=int(fields["seed"]),
            combine=fields["combine"],
            checkpoint=fields["checkpoint"],
            sampling=json.loads(fields["parameters"]),
        ),
        finish_reason=FinishReason(reason) if reason else None,
        stop=fields.get("stop", ""),
        cancel_requested="cancelled" in fields,
    )
