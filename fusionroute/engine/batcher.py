"""The engine: what event loops see of one model with the caches of many sessions.

    callers (event loop)            worker thread
    step() -> inbox ----------> admit -> compose a tick -> forward -> commit -> answer

Prefill chunks, decode steps, catch-ups and replays are the same thing here: tokens of a session that are to be fed.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import suppress
from types import TracebackType
from typing import Self, TypeVar
from uuid import uuid4

from torch import Tensor

from fusionroute.engine.model import LoadedModel, ModelFacts
from fusionroute.engine.session import Closing, SessionView, StepCall
from fusionroute.engine.sessions import SessionTable
from fusionroute.engine.steps import EngineLimits, EngineLoad, Job, StepOutcome
from fusionroute.engine.worker import Worker
from fusionroute.errors import FusionRouteError, OutOfRoom, Reason, Unavailable

T = TypeVar("T")


class Engine:
    """One model with the caches of many sessions.

    Use as an asynchronous context manager; it owns a worker thread in between.
    """

    def __init__(self, model: LoadedModel, limits: EngineLimits | None = None) -> None:
        self.limits = limits or EngineLimits()
        self._model = model
        self._worker = Worker(model, self.limits)
        self._num_accepted = 0
        self._draining = False
        self._stopping = False
        self._has_turned = True  # the event loop, since a step was run in it
        self._gathered: dict[asyncio.AbstractEventLoop, list[Job]] = {}
        self._thread = threading.Thread(target=self._worker.work, name="engine", daemon=True)

    @property
    def facts(self) -> ModelFacts:
        """Which model this is."""
        return self._model.facts

    @property
    def model(self) -> LoadedModel:
        """The model itself, for its tokenizer and end ids."""
        return self._model

    async def __aenter__(self) -> Self:
        self._thread.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for loop in [*self._gathered]:
            self._hand_over(loop)
        self._stopping = True
        self._worker.inbox.put(self._worker.stop)
        await asyncio.to_thread(self._thread.join)

    async def step(self, call: StepCall) -> StepOutcome:
        """Feeds tokens to a session.

        Raises:
            InvalidRequest, SessionStateError, OutOfRoom, Unavailable, InternalFault: see `ExpertService.Step`.
        """
        return await self.submit(call)

    def submit(self, call: StepCall) -> asyncio.Future[StepOutcome]:
        """As `step`, for whoever waits in another way. Cancelling the future gives the step up.

        Raises:
            Unavailable, OutOfRoom: it is not taken.
        """
        if self._draining or self._stopping:
            raise _stopping()
        if self._num_unfinished >= self.limits.max_queue:
            raise OutOfRoom(
                Reason.QUEUE_FULL,
                f"{self._num_unfinished} steps are waiting, the limit is {self.limits.max_queue}",
                retry_after_seconds=0.1,
            )
        loop = asyncio.get_running_loop()
        job = Job(call, time.monotonic(), loop.create_future())
        is_only = self._num_unfinished == 0
        self._num_accepted += 1
        if not (is_only and self._worker.is_quick(call)):
            self._gather(job, loop, is_alone=is_only and self._worker.expectation.lone.is_(call.session_id))
        elif self._has_turned:
            self._has_turned = False
            loop.call_soon(self._turned)
            self._run_here(job)
        else:  # whoever asks again and again without waiting must not keep the event loop from all others
            loop.call_soon(self._run_here, job)
        return job.future

    def _gather(self, job: Job, loop: asyncio.AbstractEventLoop, *, is_alone: bool) -> None:
        """Hands over, at the end of this turn of the event loop, all steps that become ready until then.

        The worker would begin with the first of them, while the event loop still readies the others.
        """
        gathered = self._gathered.setdefault(loop, [])
        gathered.append(job)
        if is_alone or len(gathered) == self._worker.expectation.group_size:
            self._hand_over(loop)
        elif len(gathered) == 1:
            loop.call_soon(self._hand_over, loop)

    def _hand_over(self, loop: asyncio.AbstractEventLoop) -> None:
        gathered = self._gathered.pop(loop, [])
        for job in gathered:
            self._worker.inbox.put(job)

    def _turned(self) -> None:
        self._has_turned = True

    def _run_here(self, job: Job) -> None:
        """A quick step in the event loop's thread, unless the worker has got something to do."""
        if self._stopping:  # the worker may have ended already
            job.future.set_exception(_stopping())
        elif not self._worker.run_here(job):
            self._worker.inbox.put(job)

    async def step_batch(self, calls: Sequence[StepCall]) -> list[StepOutcome | FusionRouteError]:
        """Steps of several sessions; one that fails does not hinder the others."""

        async def settled(call: StepCall) -> StepOutcome | FusionRouteError:
            try:
                return await self.step(call)
            except FusionRouteError as error:
                return error

        return list(await asyncio.gather(*(settled(call) for call in calls)))

    async def score(
        self, token_ids: Sequence[int], chunk_tokens: int = 256
    ) -> AsyncIterator[tuple[int, Tensor]]:
        """Rows of a whole sequence without keeping a session: (first position, rows [n, logits width]) in order."""
        session_id = f"score:{uuid4().hex}"
        try:
            for start in range(0, len(token_ids), chunk_tokens):
                chunk = token_ids[start : start + chunk_tokens]
                yield start, (await self.step(StepCall(session_id, start, chunk, len(chunk)))).rows
        finally:
            await asyncio.shield(self._ask(lambda table: table.close(session_id, 0, for_good=True)))

    async def close_session(self, session_id: str, fence: int = 0, *, for_good: bool = False) -> bool:
        """Forgets a session.

        Args:
            for_good: sessions that begin alike may not use what was computed for it either.

        Returns:
            Whether it existed.

        Raises:
            SessionStateError: STALE_FENCE.
        """
        return await self._ask(lambda table: table.close(session_id, fence, for_good=for_good))

    def let_go(self, closings: Sequence[Closing]) -> None:
        """Begins to forget sessions, which nobody is told of; one with a stale fence stays."""
        if not self._stopping:
            worker = self._worker
            worker.inbox.put(lambda: worker.table.close_all(closings))

    async def list_sessions(self, limit: int) -> tuple[list[SessionView], int]:
        """The most recently used sessions, and how many there are in all."""
        return await self._ask(lambda table: (table.views(limit, time.monotonic()), len(table)))

    def load(self) -> EngineLoad:
        """How busy the engine is."""
        table = self._worker.table
        return EngineLoad(
            num_sessions=len(table),
            queue_depth=self._num_unfinished,
            queue_limit=self.limits.max_queue,
            kv_tokens_used=table.kv_tokens_used,
            kv_tokens_limit=self.limits.kv_tokens,
            num_forwards=self._worker.num_forwards,
            num_evictions=table.num_evictions,
        )

    async def drain(self, timeout_seconds: float) -> None:
        """Refuses new steps with DRAINING and waits for the others, at most so long."""
        self._draining = True
        await asyncio.sleep(0)  # steps that were to be run in this turn of the event loop are by then
        idle = asyncio.get_running_loop().create_future()
        self._worker.inbox.put(lambda: self._worker.tell_when_idle(idle))
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout_seconds):
                await idle

    @property
    def _num_unfinished(self) -> int:
        return self._num_accepted - self._worker.num_finished

    async def _ask(self, question: Callable[[SessionTable], T]) -> T:
        """Asks in the worker thread, between forwards."""
        if self._stopping:
            raise _stopping()
        worker, future = self._worker, asyncio.get_running_loop().create_future()
        worker.inbox.put(lambda: worker.answer(future, lambda: question(worker.table)))
        answer: T = await future
        return answer


def _stopping() -> Unavailable:
    return Unavailable(Reason.DRAINING, "the service is about to stop", retry_after_seconds=1.0)
