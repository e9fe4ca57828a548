"""What can go wrong, and how each of it looks on the wire.

    FusionRouteError
    ├── InvalidRequest        the caller sent something impossible
    ├── AccessDenied          the caller has not shown a key that is known here
    ├── SessionStateError     the session is not where the caller believes it to be
    ├── OutOfRoom             no capacity now; try again later
    ├── Unavailable           a part is not there now; try again later
    ├── ModelRejected         a model or checkpoint cannot be served
    ├── TrainingFailed        a training run cannot begin or go on
    └── InternalFault         our own doing

`Reason` is what programs act on; the message is for people and names field, value and limit.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum, IntEnum
from typing import Self


class StatusCode(IntEnum):
    """The canonical status codes (google.rpc.Code) that FusionRoute uses."""

    CANCELLED = 1
    INVALID_ARGUMENT = 3
    DEADLINE_EXCEEDED = 4
    NOT_FOUND = 5
    ALREADY_EXISTS = 6
    RESOURCE_EXHAUSTED = 8
    FAILED_PRECONDITION = 9
    ABORTED = 10
    OUT_OF_RANGE = 11
    UNIMPLEMENTED = 12
    INTERNAL = 13
    UNAVAILABLE = 14
    UNAUTHENTICATED = 16


class Reason(Enum):
    """Machine-readable reason; the value is the status code it travels with."""

    def __new__(cls, code: StatusCode, text: str) -> Reason:
        member = object.__new__(cls)
        member._value_ = text
        member.code = code
        return member

    code: StatusCode

    # the caller sent something impossible
    INVALID_FIELD = StatusCode.INVALID_ARGUMENT, "INVALID_FIELD"
    TOKEN_OUT_OF_RANGE = StatusCode.INVALID_ARGUMENT, "TOKEN_OUT_OF_RANGE"
    EMPTY_PROMPT = StatusCode.INVALID_ARGUMENT, "EMPTY_PROMPT"
    CONTEXT_FULL = StatusCode.OUT_OF_RANGE, "CONTEXT_FULL"
    UNKNOWN_SLOT = StatusCode.INVALID_ARGUMENT, "UNKNOWN_SLOT"
    RULE_NOT_AVAILABLE = StatusCode.FAILED_PRECONDITION, "RULE_NOT_AVAILABLE"
    CONSTRAINT_FAILED = StatusCode.FAILED_PRECONDITION, "CONSTRAINT_FAILED"

    # the session is not where the caller believes it to be
    SESSION_UNKNOWN = StatusCode.NOT_FOUND, "SESSION_UNKNOWN"
    POSITION_AHEAD = StatusCode.FAILED_PRECONDITION, "POSITION_AHEAD"
    DIGEST_MISMATCH = StatusCode.FAILED_PRECONDITION, "DIGEST_MISMATCH"
    EPOCH_MISMATCH = StatusCode.FAILED_PRECONDITION, "EPOCH_MISMATCH"
    STALE_FENCE = StatusCode.FAILED_PRECONDITION, "STALE_FENCE"
    SESSION_BUSY = StatusCode.ABORTED, "SESSION_BUSY"
    LEASE_LOST = StatusCode.ABORTED, "LEASE_LOST"
    LEASE_EXPIRED = StatusCode.NOT_FOUND, "LEASE_EXPIRED"
    REVISION_CONFLICT = StatusCode.ABORTED, "REVISION_CONFLICT"
    RELOADING = StatusCode.ABORTED, "RELOADING"
    CHECKPOINT_CHANGED = StatusCode.FAILED_PRECONDITION, "CHECKPOINT_CHANGED"
    TURN_FORKED = StatusCode.FAILED_PRECONDITION, "TURN_FORKED"

    # no capacity now
    KV_MEMORY_FULL = StatusCode.RESOURCE_EXHAUSTED, "KV_MEMORY_FULL"
    QUEUE_FULL = StatusCode.RESOURCE_EXHAUSTED, "QUEUE_FULL"
    DEADLINE_PASSED = StatusCode.DEADLINE_EXCEEDED, "DEADLINE_PASSED"

    # the caller may not
    UNAUTHENTICATED = StatusCode.UNAUTHENTICATED, "UNAUTHENTICATED"

    # a part is not there now
    EXPERT_UNAVAILABLE = StatusCode.UNAVAILABLE, "EXPERT_UNAVAILABLE"
    STORE_UNAVAILABLE = StatusCode.UNAVAILABLE, "STORE_UNAVAILABLE"
    DRAINING = StatusCode.UNAVAILABLE, "DRAINING"
    LEFT_ALONE = StatusCode.UNAVAILABLE, "LEFT_ALONE"
    REMOTE_UNAVAILABLE = StatusCode.UNAVAILABLE, "REMOTE_UNAVAILABLE"

    # a model or checkpoint cannot be served
    MODEL_NOT_FOUND = StatusCode.NOT_FOUND, "MODEL_NOT_FOUND"
    MODEL_UNSUPPORTED = StatusCode.FAILED_PRECONDITION, "MODEL_UNSUPPORTED"
    MODEL_BROKEN = StatusCode.FAILED_PRECONDITION, "MODEL_BROKEN"
    CHECKPOINT_INCOMPLETE = StatusCode.FAILED_PRECONDITION, "CHECKPOINT_INCOMPLETE"
    VOCABULARY_MISMATCH = StatusCode.FAILED_PRECONDITION, "VOCABULARY_MISMATCH"

    # training
    DATA_INVALID = StatusCode.INVALID_ARGUMENT, "DATA_INVALID"
    LABELS_STALE = StatusCode.FAILED_PRECONDITION, "LABELS_STALE"
    EXPERTS_MISMATCH = StatusCode.FAILED_PRECONDITION, "EXPERTS_MISMATCH"
    LOSS_NOT_FINITE = StatusCode.FAILED_PRECONDITION, "LOSS_NOT_FINITE"
    STORAGE_FULL = StatusCode.RESOURCE_EXHAUSTED, "STORAGE_FULL"
    STATE_BROKEN = StatusCode.FAILED_PRECONDITION, "STATE_BROKEN"
    JOB_UNKNOWN = StatusCode.NOT_FOUND, "JOB_UNKNOWN"
    JOB_STATE = StatusCode.FAILED_PRECONDITION, "JOB_STATE"
    KEY_REUSED = StatusCode.ALREADY_EXISTS, "KEY_REUSED"
    CHECKPOINT_UNKNOWN = StatusCode.NOT_FOUND, "CHECKPOINT_UNKNOWN"
    NOTHING_TO_ROLL_BACK = StatusCode.FAILED_PRECONDITION, "NOTHING_TO_ROLL_BACK"

    # evaluation
    SANDBOX_WEAK = StatusCode.UNAVAILABLE, "SANDBOX_WEAK"

    # our own doing
    NON_FINITE_LOGITS = StatusCode.INTERNAL, "NON_FINITE_LOGITS"
    INTERNAL = StatusCode.INTERNAL, "INTERNAL"


class FusionRouteError(Exception):
    """Base of all errors that FusionRoute raises on purpose.

    Args:
        reason: what happened, for programs.
        message: what happened, for people.
        metadata: facts for programs, for example ``cached_length``.
        retry_after_seconds: when trying again makes sense; None when it does not.
    """

    def __init__(
        self,
        reason: Reason,
        message: str,
        *,
        metadata: Mapping[str, str] | None = None,
        retry_after_seconds: float | None = None,
    ) -> None:
        super().__init__(message)
        self.reason = reason
        self.message = message
        self.metadata: dict[str, str] = dict(metadata or {})
        self.retry_after_seconds = retry_after_seconds

    def afresh(self) -> Self:
        """The same error without traceback and causes, whose frames keep alive what they hold.

        For one that is kept: an object that holds an error which was raised in its own methods holds itself.
        """
        return type(self)(
            self.reason,
            self.message,
            metadata=self.metadata,
            retry_after_seconds=self.retry_after_seconds,
        )

    @property
    def code(self) -> StatusCode:
        """The status code this error travels with."""
        return self.reason.code

    @property
    def cached_length(self) -> int | None:
        """Tokens that the answering side has cached, where it said so."""
        value = self.metadata.get("cached_length")
        return int(value) if value is not None else None


class InvalidRequest(FusionRouteError):
    """The caller sent something impossible; sending it again cannot help."""


class AccessDenied(FusionRouteError):
    """The caller has not shown a key that is known here."""


class SessionStateError(FusionRouteError):
    """The session is not where the caller believes it to be."""


class OutOfRoom(FusionRouteError):
    """No capacity now; the same request may succeed later."""


class Unavailable(FusionRouteError):
    """A part is not there now; the same request may succeed later."""


class ModelRejected(FusionRouteError):
    """A model or checkpoint cannot be served as it is."""


class TrainingFailed(FusionRouteError):
    """A training run cannot begin or go on as it is."""


class InternalFault(FusionRouteError):
    """A fault of the service itself."""


CLASS_BY_CODE: dict[StatusCode, type[FusionRouteError]] = {
    StatusCode.INVALID_ARGUMENT: InvalidRequest,
    StatusCode.OUT_OF_RANGE: InvalidRequest,
    StatusCode.ALREADY_EXISTS: InvalidRequest,
    StatusCode.NOT_FOUND: SessionStateError,
    StatusCode.FAILED_PRECONDITION: SessionStateError,
    StatusCode.ABORTED: SessionStateError,
    StatusCode.RESOURCE_EXHAUSTED: OutOfRoom,
    StatusCode.DEADLINE_EXCEEDED: Unavailable,
    StatusCode.UNAVAILABLE: Unavailable,
    StatusCode.UNAUTHENTICATED: AccessDenied,
    StatusCode.INTERNAL: InternalFault,
}


MAX_SHOWN_CHARACTERS = 200


def _shown(value: object) -> str:
    """A value for a message; a caller who sends megabytes does not get them back."""
    if isinstance(value, str) and len(value) > MAX_SHOWN_CHARACTERS:
        return f"{value[:MAX_SHOWN_CHARACTERS]!r}... ({len(value)} characters)"
    text = repr(value)
    return text if len(text) <= 2 * MAX_SHOWN_CHARACTERS else f"{text[: 2 * MAX_SHOWN_CHARACTERS]}..."


def invalid(field: str, value: object, limit: str) -> InvalidRequest:
    """An INVALID_FIELD error that names the field, its value and what is allowed."""
    return InvalidRequest(
        Reason.INVALID_FIELD,
        f"{field} = {_shown(value)} is not allowed: {limit}",
        metadata={"field": field, "limit": limit},
    )
