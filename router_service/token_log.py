"""The writer's end of a session: tokens go to the store behind the stream, in order, exactly once."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable
from types import TracebackType
from typing import Self
from weakref import WeakSet

import structlog

from fusionroute.background import end_task
from fusionroute.errors import (
    FusionRouteError,
    InternalFault,
    OutOfRoom,
    Reason,
    SessionStateError,
    Unavailable,
)
from router_service import metrics
from router_service.records import RECORD_BYTES, TokenRecord, pack_one
from router_service.session_store import SessionStore, as_lease_lost, was_deleted
from router_service.stored_session import FinishReason, Lease, OpenTurn, WriteOutcome, WriteVerdict

QUIET_CLOSE_SECONDS = 2.0
"""How long storing the rest may take when the writer is stopped by an error or a cancellation."""
MOST_RESTORATIONS = 10
"""Of one call: a Redis that forgets faster than it is told cannot be helped."""

OPEN_LOGS: WeakSet[TokenLog] = WeakSet()
"""Of all turns that are written in this process."""

log = structlog.get_logger(__name__)


def _nothing() -> None:
    """Nobody wants to hear of a cancellation."""


class TokenLog:
    """Appends tokens to a leased session without making the decode loop wait.

    `append` only remembers; a task in the background sends everything that has gathered in one call, repeats
    it while Redis is away (appending is idempotent) and renews the lease. What Redis has lost (its last second, the
    end of its file, everything) is put back. What went wrong is raised by the next `append`, `room` or `flush`:
    LEASE_LOST when another writer took the session, SESSION_UNKNOWN when it was deleted, STORE_UNAVAILABLE when Redis
    was away for too long.

    Leaving the `async with` block stores what is pending and gives the lease back, the turn finished or not.

    Args:
        held: all records of the session as the store holds them now, packed; the log keeps them, 16 bytes a token.
        turn: the turn that is written.
        max_pending_tokens: how far the store may trail the stream.
        linger_seconds: how long a token may wait for others to travel with.
        patience_seconds: how long Redis may be away.
        on_cancel: called once when somebody has asked for the end of this turn.
    """

    def __init__(
        self,
        store: SessionStore,
        lease: Lease,
        held: bytes,
        turn: OpenTurn,
        *,
        max_pending_tokens: int = 512,
        linger_seconds: float = 0.05,
        patience_seconds: float = 60.0,
        on_cancel: Callable[[], None] = _nothing,
    ) -> None:
        assert len(held) % RECORD_BYTES == 0, len(held)
        self._store = store
        self._lease = lease
        self._turn = turn
        self._held = bytearray(held)
        self._stored_length = self.length
        self._max_pending_tokens = max_pending_tokens
        self._linger_seconds = linger_seconds
        self._patience_seconds = patience_seconds
        self._on_cancel = on_cancel
        self._has_work = asyncio.Event()
        self._hurry = asyncio.Event()
        self._progress = asyncio.Event()
        self._fault: FusionRouteError | None = None
        self._sender: asyncio.Task[None] | None = None
        self.cancel_requested = False
        """Somebody has asked for the end of this turn; known one append or renewal later."""
        self.waited_seconds = 0.0
        """Time that the writer spent waiting for the store."""
        self.num_restorations = 0
        """Times that Redis had lost something of this session."""

    @property
    def length(self) -> int:
        """Tokens of the session, those on their way to the store included."""
        return len(self._held) // RECORD_BYTES

    @property
    def num_pending_tokens(self) -> int:
        """Tokens that the store has not confirmed yet."""
        return self.length - self._stored_length

    def append(self, record: TokenRecord) -> None:
        """Remembers a token for the store; never waits.

        Raises:
            OutOfRoom: QUEUE_FULL, the store trails too far; `await room()` first.
            FusionRouteError: what stopped the log.
        """
        self._raise_fault()
        if self.num_pending_tokens >= self._max_pending_tokens:
            limit = f"no more than {self._max_pending_tokens} may"
            raise OutOfRoom(
                Reason.QUEUE_FULL, f"{self.num_pending_tokens} tokens wait for the store, {limit}"
            )
        self._held += pack_one(record)
        self._has_work.set()

    async def room(self) -> None:
        """Returns when a token may be appended: at once, unless the store trails too far."""
        if self.num_pending_tokens >= self._max_pending_tokens:
            await self._until_pending_are_fewer_than(self._max_pending_tokens)
        self._raise_fault()

    async def flush(self, deadline_seconds: float | None = None) -> None:
        """Returns once the store has confirmed all tokens appended so far.

        Raises:
            Unavailable: STORE_UNAVAILABLE, not so before the deadline (None: the log's patience).
            FusionRouteError: what stopped the log.
        """
        limit = self._patience_seconds if deadline_seconds is None else deadline_seconds
        self._raise_fault()
        try:
            async with asyncio.timeout(limit):
                await self._until_pending_are_fewer_than(1)
        except TimeoutError:
            message = f"{self.num_pending_tokens} tokens were not stored within {limit:g} s"
            raise Unavailable(Reason.STORE_UNAVAILABLE, message, retry_after_seconds=1.0) from None
        self._raise_fault()

    async def finish(self, reason: FinishReason, *, stop: str = "") -> None:
        """Stores what is pending, closes the turn and gives the lease back.

        Raises:
            FusionRouteError: what stopped the log, or what `SessionStore.finish` raises.
        """
        await self.flush()
        await self._stop_sender()
        started = time.monotonic()

        async def finish() -> None:
            await self._store.finish(
                self._lease, self.length, reason, stop=stop, deadline_seconds=self._patience_seconds
            )

        try:
            await self._with_restoring(finish, self._patience_seconds)
        except SessionStateError as error:
            raise as_lease_lost(error) from error
        finally:
            self.waited_seconds += time.monotonic() - started

    async def __aenter__(self) -> Self:
        assert self._sender is None, "already open"
        OPEN_LOGS.add(self)
        self._sender = asyncio.create_task(self._send_until_stopped(), name=f"log {self._lease.session_id}")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if self._sender is not None:
                await self._close(quietly=error is not None)
        finally:
            OPEN_LOGS.discard(self)
            await self._stop_sender()

    async def _close(self, *, quietly: bool) -> None:
        """Stores the rest and gives the lease back; `quietly` where another error is on its way already."""
        try:
            await self.flush(QUIET_CLOSE_SECONDS if quietly else None)
        except FusionRouteError:
            if not quietly:
                raise
        finally:
            await self._stop_sender()
            with contextlib.suppress(FusionRouteError):  # else it runs out by itself
                await self._with_restoring(self._release, QUIET_CLOSE_SECONDS)

    async def _release(self) -> None:
        await self._store.release(self._lease, deadline_seconds=QUIET_CLOSE_SECONDS)

    async def _stop_sender(self) -> None:
        if self._sender is not None:
            sender, self._sender = self._sender, None
            await end_task(sender)

    async def _send_until_stopped(self) -> None:
        try:
            while True:
                if await self._gather():
                    await self._with_restoring(self._send, self._patience_seconds)
                else:
                    await self._with_restoring(self._renew, self._patience_seconds)
        except SessionStateError as error:
            self._fault = as_lease_lost(error)
        except FusionRouteError as error:
            self._fault = error
        except Exception as error:
            self._fault = InternalFault(Reason.INTERNAL, f"the token log failed: {error!r}")
            self._fault.__cause__ = error
        finally:
            self._announce_progress()

    async def _gather(self) -> bool:
        """Waits for tokens to send, then for their companions. False: time to renew the lease instead."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._store.lease_seconds / 3):
                await self._has_work.wait()
        if not self._has_work.is_set():
            return False
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._linger_seconds):
                await self._hurry.wait()
        return True

    async def _send(self) -> None:
        """Sends all pending tokens and takes over what the store says."""
        self._has_work.clear()
        pending = bytes(self._held[self._stored_length * RECORD_BYTES :])
        outcome = await self._store.append(
            self._lease, self._stored_length, pending, deadline_seconds=self._patience_seconds
        )
        self._take_over(outcome)

    async def _renew(self) -> None:
        with contextlib.suppress(Unavailable):  # nothing to store: the next token may find Redis back
            self._take_over(await self._store.renew(self._lease))

    def _take_over(self, outcome: WriteOutcome) -> None:
        """What the store says of itself. Raises SESSION_UNKNOWN when it has lost what it had confirmed."""
        if outcome.verdict is WriteVerdict.CONFLICT:
            message = f"the store's tokens of session {self._lease.session_id} are not the writer's"
            raise InternalFault(Reason.INTERNAL, message)
        if outcome.length < self._stored_length:
            message = f"the store has {outcome.length} tokens left of {self._stored_length}"
            raise SessionStateError(Reason.SESSION_UNKNOWN, message)
        self._stored_length = min(outcome.length, self.length)
        if self.num_pending_tokens > 0:
            self._has_work.set()
        if outcome.cancel_requested and not self.cancel_requested:
            self.cancel_requested = True
            self._on_cancel()
        self._announce_progress()

    async def _with_restoring(self, write: Callable[[], Awaitable[None]], deadline_seconds: float) -> None:
        """A write, repeated after putting the session back as often as the store turns out to have lost it."""
        for attempt in range(MOST_RESTORATIONS + 1):
            try:
                return await write()
            except SessionStateError as error:
                lost = error.reason in (Reason.SESSION_UNKNOWN, Reason.POSITION_AHEAD) and not was_deleted(
                    error
                )
                if not lost or attempt == MOST_RESTORATIONS:
                    raise
            await self._restore(deadline_seconds)

    async def _restore(self, deadline_seconds: float) -> None:
        """Puts the whole session back."""
        held = bytes(self._held)
        try:
            outcome = await self._store.restore(
                self._lease, held, self._turn, deadline_seconds=deadline_seconds
            )
        except FusionRouteError as error:
            metrics.STORE_RESTORES.labels(outcome=error.reason.value).inc()
            raise
        metrics.STORE_RESTORES.labels(outcome="restored").inc()
        self._stored_length = 0
        self._take_over(outcome)
        self.num_restorations += 1
        log.warning("session_restored", session=self._lease.session_id, num_tokens=len(held) // RECORD_BYTES)

    def _announce_progress(self) -> None:
        self._progress.set()
        self._progress = asyncio.Event()

    async def _until_pending_are_fewer_than(self, limit: int) -> None:
        started = time.monotonic()
        self._hurry.set()
        try:
            while self._fault is None and self.num_pending_tokens >= limit:
                await self._progress.wait()
        finally:
            self._hurry.clear()
            self.waited_seconds += time.monotonic() - started

    def _raise_fault(self) -> None:
        if self._fault is not None:
            raise self._fault
