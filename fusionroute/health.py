"""Three questions about a server: does it live, does its work move, should it be given work.

    lives        whoever answers at all lives: the event loop runs
    progresses   pending work moves; idle is healthy, busy is healthy, frozen is not     -> restart it
    ready        it progresses, is not about to stop, and has what it needs              -> send work elsewhere

grpc.health.v1 answers "is it worth keeping" (it lives and progresses, and is not about to stop) for the name "" and the
service's own, and "should it be given work" for the name READINESS. `fusionroute.watch_server` answers all three.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass

import structlog
from grpc_health.v1 import health, health_pb2

from fusionroute.background import end_task

READINESS = "readiness"
LOOK_EVERY_SECONDS = 1.0
READY_TIMEOUT_SECONDS = 2.0

WhyNotReady = Callable[[], Awaitable[Sequence[str]]]
"""What a service lacks to be given work; nothing when it should be."""

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Progress:
    """A service's pulse: `tick` must change while `pending`."""

    pending: bool
    tick: int


class ProgressWatch:
    """Tells busy from frozen: idle is healthy, busy is healthy, pending without progress for long is not."""

    def __init__(self, frozen_after_seconds: float) -> None:
        self._frozen_after_seconds = frozen_after_seconds
        self._tick: int | None = None
        self._moved_at = 0.0
        self.still_seconds = 0.0
        """How long pending work had not moved at the last look."""

    def is_healthy(self, progress: Progress, now: float) -> bool:
        """Takes one look at the pulse at the monotonic time `now`."""
        if not progress.pending or progress.tick != self._tick:
            self._tick = progress.tick
            self._moved_at = now
        self.still_seconds = now - self._moved_at
        return self.still_seconds < self._frozen_after_seconds


async def always_ready() -> Sequence[str]:
    """Of a service that needs nobody else."""
    return ()


class ServerHealth:
    """What is known of a server's health, and its grpc.health.v1 servicer.

    Args:
        names: of the services.
        progress: their pulse; None = as long as the event loop runs.
        why_not_ready: what they lack to be given work.
        frozen_after_seconds: pending work without a tick for so long is frozen.
    """

    def __init__(
        self,
        names: Sequence[str],
        progress: Callable[[], Progress] | None = None,
        why_not_ready: WhyNotReady | None = None,
        frozen_after_seconds: float = 120.0,
    ) -> None:
        self.servicer = health.aio.HealthServicer()
        self.is_draining = False
        self.is_progressing = True
        self.is_ready = False
        """At the last look."""
        self._names = ("", *names)
        self._progress = progress
        self._service_lacks = why_not_ready or always_ready
        self._frozen_after_seconds = frozen_after_seconds
        self._watch = ProgressWatch(frozen_after_seconds)

    @property
    def still_seconds(self) -> float:
        """How long pending work has not moved."""
        return self._watch.still_seconds

    async def why_not_ready(self) -> list[str]:
        """Why no work should be sent here, for people; empty when it should."""
        reasons = ["draining: the service is about to stop"] if self.is_draining else []
        if not self.is_progressing:
            reasons.append(f"frozen: pending work has not moved for {self.still_seconds:.1f} s")
        try:
            async with asyncio.timeout(READY_TIMEOUT_SECONDS):
                reasons.extend(await self._service_lacks())
        except TimeoutError:
            reasons.append(f"unknown: not answered within {READY_TIMEOUT_SECONDS:g} s")
        except Exception as error:
            log.exception("readiness_failed")
            reasons.append(f"unknown: {type(error).__name__}")
        return reasons

    @asynccontextmanager
    async def watched(self) -> AsyncIterator[None]:
        """Answers grpc.health.v1 within the context, from looks taken about once a second."""
        await self._set(self._names, True)
        await self._set([READINESS], False)
        looking = asyncio.create_task(self._look_again_and_again(), name="health")
        try:
            yield
        finally:
            await end_task(looking)

    async def begin_drain(self) -> None:
        """Every name says NOT_SERVING from now on."""
        self.is_draining, self.is_ready = True, False
        await self.servicer.enter_graceful_shutdown()

    async def _look_again_and_again(self) -> None:
        while True:
            await self._look_at_progress()
            reasons = await self.why_not_ready()
            if bool(reasons) is self.is_ready:
                self.is_ready = not reasons
                log.info("readiness_changed", ready=self.is_ready, reasons=reasons)
                await self._set([READINESS], self.is_ready)
            await asyncio.sleep(min(LOOK_EVERY_SECONDS, self._frozen_after_seconds / 4))

    async def _look_at_progress(self) -> None:
        if self._progress is None:
            return
        progresses = self._watch.is_healthy(self._progress(), time.monotonic())
        if progresses != self.is_progressing:
            self.is_progressing = progresses
            log.log(20 if progresses else 40, "health_changed", serving=progresses)
            await self._set(self._names, progresses)

    async def _set(self, names: Sequence[str], serving: bool) -> None:
        status = health_pb2.HealthCheckResponse
        for name in names:
            await self.servicer.set(name, status.SERVING if serving else status.NOT_SERVING)
