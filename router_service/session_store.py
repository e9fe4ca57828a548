"""Sessions in Redis: their tokens, their turn and who may write them. The tokens here are the truth.

    fr:{sid}:meta    hash    fence, owner, and the latest turn: state, request id, answer position ...
    fr:{sid}:tok     string  the tokens, prompts included, as records of sixteen bytes
    fr:{sid}:lease   string  the owner; gone when its writer has not been heard of for a while
    fr:{sid}:gone    string  for some minutes after a deletion: the highest fence that it was meant for

A writer acquires a session and is given a fence, a number that only grows, with the clock: max(previous + 1,
microseconds now). Every write carries fence and owner: who was overtaken by another writer is refused, however
late its write arrives. A writer whose fence is higher than the store's, or whose session the store does not know,
has found a Redis that lost what it was told; it puts the session back (`restore`). Every operation is one round trip
and may be repeated.
"""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Sequence
from typing import Any

from redis.asyncio import Redis

from fusionroute.errors import FusionRouteError, Reason, SessionStateError, invalid
from fusionroute.redis_scripts import ScriptRunner, load_script
from router_service.records import RECORD_BYTES
from router_service.stored_session import (
    CancelOutcome,
    FinishReason,
    Lease,
    OpenTurn,
    StoredSession,
    TurnBegun,
    TurnParameters,
    WriteOutcome,
    WriteVerdict,
    parse_session,
)

TOMBSTONE_SECONDS = 600.0
"""For so long a deletion is remembered, so that a writer does not mistake it for a loss."""

_SESSION_ID = re.compile(r"[A-Za-z0-9_.:-]{1,128}")


def new_session_id() -> str:
    """A session id that nobody can guess."""
    return uuid.uuid4().hex


class SessionStore:
    """Sessions in one Redis.

    Args:
        client: from `fusionroute.private_redis.connect`.
        ttl_seconds: a session is forgotten so long after its last write.
        lease_seconds: a writer that is silent for so long may be replaced.
        deadline_seconds: how long an operation may take, repetitions included.

    Every method raises Unavailable (STORE_UNAVAILABLE) when Redis did not answer by then.
    """

    def __init__(
        self,
        client: Redis,
        *,
        ttl_seconds: float = 86_400.0,
        lease_seconds: float = 10.0,
        deadline_seconds: float = 5.0,
    ) -> None:
        self._client = client
        self._runner = ScriptRunner(client, deadline_seconds=deadline_seconds)
        self.lease_seconds = lease_seconds
        self._ttl_seconds = ttl_seconds

    async def acquire(
        self, session_id: str, owner: str, *, create: bool = True, ttl_seconds: float | None = None
    ) -> Lease:
        """Makes `owner` the only writer of a session. The same owner again keeps its fence.

        Args:
            owner: unique for each writer, not for each process.
            create: whether an unknown session comes into being.
            ttl_seconds: this session is forgotten so long after its last write; None = as all are.

        Raises:
            SessionStateError: SESSION_BUSY, another writer is alive (with the time to wait); SESSION_UNKNOWN.
        """
        if not owner:
            raise invalid("owner", owner, "it must not be empty")
        arguments: list[str | bytes | int] = [owner, *self._times(ttl_seconds), int(create)]
        answer = await self._runner.run(
            load_script("router_service", "acquire"), session_keys(session_id), arguments
        )
        if answer[0] == b"held":
            wait = max(int(answer[1]), 1) / 1000
            message = f"session {session_id} is being written by another; its lease ends in {wait:.3f} s"
            raise SessionStateError(Reason.SESSION_BUSY, message, retry_after_seconds=wait)
        self._reject(session_id, answer)
        return Lease(session_id, owner, int(answer[1]), int(answer[2]), ttl_seconds)

    async def renew(self, lease: Lease) -> WriteOutcome:
        """Prolongs a lease and the session's life. Appending does so too.

        Raises:
            SessionStateError: LEASE_LOST or SESSION_UNKNOWN.
        """
        try:
            return _outcome(await self._write("renew", lease))
        except SessionStateError as error:
            raise as_lease_lost(error) from error

    async def append(
        self, lease: Lease, position: int, records: bytes, *, deadline_seconds: float | None = None
    ) -> WriteOutcome:
        """Puts packed records at `position`. The same again is done; nothing stored is ever changed.

        Raises:
            SessionStateError: STALE_FENCE, LEASE_LOST (it was given back) or SESSION_UNKNOWN.
        """
        assert len(records) % RECORD_BYTES == 0, len(records)
        return _outcome(
            await self._write("append", lease, position, records, deadline_seconds=deadline_seconds)
        )

    async def begin_turn(
        self, lease: Lease, position: int, prompt: bytes, turn: TurnParameters, *, request_id: str = ""
    ) -> TurnBegun:
        """Appends the packed prompt at the session's end and records how the answer is made, at once.

        A turn that was left unfinished stays where it is and is succeeded by this one.

        Args:
            position: where the caller believes that the session ends.
            request_id: the same id again begins no second turn; empty draws one.

        Raises:
            SessionStateError: POSITION_AHEAD when `position` is not the session's end (`cached_length` is);
                STALE_FENCE, LEASE_LOST, SESSION_UNKNOWN.
        """
        answer = await self._write(
            "begin_turn",
            lease,
            position,
            prompt,
            request_id or uuid.uuid4().hex,
            *_parameters(turn),
        )
        if answer[0] in (b"gap", b"conflict"):
            raise _moved(lease.session_id, position, int(answer[1]))
        return TurnBegun(answer[0] == b"done", answer_position=int(answer[1]), length=int(answer[2]))

    async def restore(
        self, lease: Lease, records: bytes, turn: OpenTurn, *, deadline_seconds: float | None = None
    ) -> WriteOutcome:
        """Puts a session back that Redis has lost, wholly or in part. Nothing is lost: nothing happens.

        Args:
            records: all of the session, packed, as its writer holds them.
            turn: the one that is being written.

        Raises:
            SessionStateError: SESSION_UNKNOWN, it was deleted on purpose; STALE_FENCE, LEASE_LOST.
        """
        answer = await self._write(
            "restore",
            lease,
            records,
            turn.request_id,
            turn.answer_position,
            *_parameters(turn.parameters),
            deadline_seconds=deadline_seconds,
        )
        return _outcome(answer)

    async def finish(
        self,
        lease: Lease,
        length: int,
        reason: FinishReason,
        *,
        stop: str = "",
        deadline_seconds: float | None = None,
    ) -> None:
        """Closes the turn and gives the lease back.

        Args:
            length: tokens that the session must hold by now, so that no tail is lost unseen.
            stop: the stop string that ended the turn.

        Raises:
            SessionStateError: POSITION_AHEAD when the session has another length; STALE_FENCE, LEASE_LOST,
                SESSION_UNKNOWN.
        """
        answer = await self._write(
            "finish", lease, length, reason.value, stop, deadline_seconds=deadline_seconds
        )
        if answer[0] != b"done":
            raise _moved(lease.session_id, length, int(answer[1]))

    async def release(self, lease: Lease, *, deadline_seconds: float | None = None) -> None:
        """Gives the lease back and leaves the turn as it is. A lease that is lost already is fine.

        Raises:
            SessionStateError: SESSION_UNKNOWN.
        """
        try:
            await self._write("release", lease, deadline_seconds=deadline_seconds)
        except SessionStateError as error:
            if error.reason is not Reason.STALE_FENCE:
                raise

    async def cancel(self, session_id: str) -> CancelOutcome:
        """Asks the writer of the running turn to stop.

        Raises:
            SessionStateError: SESSION_UNKNOWN.
        """
        answer = await self._runner.run(load_script("router_service", "cancel"), session_keys(session_id), [])
        self._reject(session_id, answer)
        return CancelOutcome(was_running=answer[0] == b"done", writer_is_alive=int(answer[1]) > 0)

    async def get(self, session_id: str, from_position: int = 0) -> StoredSession:
        """What is stored of a session, its tokens from `from_position` on. Does not prolong its life.

        Raises:
            SessionStateError: SESSION_UNKNOWN.
        """
        answer = await self._runner.run(
            load_script("router_service", "read"), session_keys(session_id), [from_position]
        )
        self._reject(session_id, answer)
        return parse_session(session_id, from_position, answer)

    async def delete(self, session_id: str) -> bool:
        """Forgets a session; whoever writes it learns so from its next write. Returns whether it existed."""
        answer = await self._runner.run(
            load_script("router_service", "delete"), session_keys(session_id), [_milliseconds(TOMBSTONE_SECONDS)]
        )
        return bool(answer[0] == b"done")

    async def _write(
        self,
        script: str,
        lease: Lease,
        *arguments: str | bytes | int,
        deadline_seconds: float | None = None,
    ) -> Sequence[Any]:
        answer = await self._runner.run(
            load_script("router_service", "session", script),
            session_keys(lease.session_id),
            [lease.fence, *self._times(lease.ttl_seconds), lease.owner, *arguments],
            deadline_seconds=deadline_seconds,
        )
        self._reject(lease.session_id, answer, lease)
        return answer

    def _times(self, ttl_seconds: float | None) -> tuple[int, int]:
        """Of a lease and of a session, in milliseconds."""
        ttl = self._ttl_seconds if ttl_seconds is None else ttl_seconds
        return _milliseconds(self.lease_seconds), _milliseconds(ttl)

    def _reject(self, session_id: str, answer: Sequence[Any], lease: Lease | None = None) -> None:
        if answer[0] == b"unknown":
            message = f"session {session_id} is not known: never begun, deleted or expired"
            raise SessionStateError(Reason.SESSION_UNKNOWN, message)
        if answer[0] == b"deleted":
            message = f"session {session_id} was deleted"
            raise SessionStateError(Reason.SESSION_UNKNOWN, message, metadata={"deleted": "true"})
        if answer[0] == b"behind":
            message = f"the store has lost the latest of session {session_id}"
            raise SessionStateError(Reason.SESSION_UNKNOWN, message)
        if answer[0] == b"stale":
            assert lease is not None
            fences = f"fence {lease.fence} was followed by {int(answer[1])}"
            raise SessionStateError(Reason.STALE_FENCE, f"session {session_id} has a newer writer: {fences}")
        if answer[0] == b"released":
            message = f"the lease on session {session_id} was given back"
            raise SessionStateError(Reason.LEASE_LOST, message)


def session_keys(session_id: str) -> list[str]:
    """The keys of a session: meta, tok, lease, gone.

    Raises:
        InvalidRequest: the id is empty, too long or holds other characters than letters, digits and ``_.:-``.
    """
    if not _SESSION_ID.fullmatch(session_id):
        raise invalid("session_id", session_id, "1 to 128 letters, digits or any of _ . : -")
    return [f"fr:{{{session_id}}}:{part}" for part in ("meta", "tok", "lease", "gone")]


def as_lease_lost(error: SessionStateError) -> SessionStateError:
    """What a writer that was overtaken is told: LEASE_LOST. Other errors stay what they are."""
    if error.reason is not Reason.STALE_FENCE:
        return error
    return SessionStateError(Reason.LEASE_LOST, error.message, metadata=error.metadata)


def _outcome(answer: Sequence[Any]) -> WriteOutcome:
    return WriteOutcome(WriteVerdict(answer[0].decode()), int(answer[1]), cancel_requested=bool(answer[2]))


def _parameters(turn: TurnParameters) -> tuple[str | int, ...]:
    return json.dumps(dict(turn.sampling), sort_keys=True), turn.seed, turn.combine, turn.checkpoint


def was_deleted(error: FusionRouteError) -> bool:
    """Whether a session is unknown because somebody wanted it so, and not because Redis has lost it."""
    return error.metadata.get("deleted") == "true"


def _moved(session_id: str, position: int, length: int) -> FusionRouteError:
    message = f"session {session_id} holds {length} tokens, not {position}"
    return SessionStateError(Reason.POSITION_AHEAD, message, metadata={"cached_length": str(length)})


def _milliseconds(seconds: float) -> int:
    return max(round(seconds * 1000), 1)
