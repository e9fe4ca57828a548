"""The engine: one worker thread that packs the waiting steps of many sessions into one forward after another.

    callers (event loop)            worker thread
    step() -> inbox ----------> admit -> compose a tick -> forward -> commit -> answer

Prefill chunks, decode steps, catch-ups and replays are the same thing here: tokens of a session that are to be fed.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import Future
from types import TracebackType
from typing import Self, TypeVar
from uuid import uuid4

import torch
from torch import Tensor

from fusionroute.engine.attention import RaggedBatch, Segment
from fusionroute.engine.model import ForwardOutput, LoadedModel, ModelFacts
from fusionroute.engine.schedule import Schedule
from fusionroute.engine.session import Session, SessionView, StepCall
from fusionroute.engine.sessions import NoRoomYet, SessionTable, room_taken
from fusionroute.engine.steps import Chunk, EngineLimits, EngineLoad, Job, StepOutcome
from fusionroute.errors import FusionRouteError, InternalFault, OutOfRoom, Reason, Unavailable
from fusionroute.fusion import choose

T = TypeVar("T")


class Engine:
    """One model with the caches of many sessions.

    Use as an asynchronous context manager; it owns a worker thread in between.
    """

    def __init__(self, model: LoadedModel, limits: EngineLimits | None = None) -> None:
        self.limits = limits or EngineLimits()
        self._model = model
        self._cache = model.kv_cache()
        self._table = SessionTable(
            kv_tokens=self.limits.kv_tokens,
            max_sessions=self.limits.max_sessions,
            max_context_tokens=model.facts.max_context_tokens,
            logits_width=model.facts.logits_width,
            epoch=model.facts.epoch,
            free=self._cache.free,
        )
        self._wake = threading.Condition()
        self._inbox: deque[Job | Callable[[], None]] = deque()
        self._waiting: deque[Job] = deque()  # for room
        self._running: deque[Job] = deque()  # admitted, not all fed
        self._schedule = Schedule(self.limits)
        self._num_unfinished = 0
        self._num_forwards = 0
        self._draining = False
        self._stopping = False
        self._thread = threading.Thread(target=self._work, name="engine", daemon=True)

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
        with self._wake:
            self._stopping = True
            self._wake.notify_all()
        await asyncio.to_thread(self._thread.join)

    async def step(self, call: StepCall) -> StepOutcome:
        """Feeds tokens to a session.

        Raises:
            InvalidRequest, SessionStateError, OutOfRoom, Unavailable, InternalFault: see `ExpertService.Step`.
        """
        return await asyncio.wrap_future(self._enqueue(call))

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
            await asyncio.shield(self.close_session(session_id))

    async def close_session(self, session_id: str, fence: int = 0) -> bool:
        """Forgets a session; returns whether it existed. Raises SessionStateError STALE_FENCE."""
        return await self._ask(lambda: self._table.close(session_id, fence))

    async def list_sessions(self, limit: int) -> tuple[list[SessionView], int]:
        """The most recently used sessions, and how many there are in all."""
        return await self._ask(lambda: (self._table.views(limit, time.monotonic()), len(self._table)))

    def load(self) -> EngineLoad:
        """How busy the engine is."""
        return EngineLoad(
            num_sessions=len(self._table),
            queue_depth=self._num_unfinished,
            queue_limit=self.limits.max_queue,
            kv_tokens_used=self._table.kv_tokens_used,
            kv_tokens_limit=self.limits.kv_tokens,
            num_forwards=self._num_forwards,
            num_evictions=self._table.num_evictions,
        )

    async def drain(self, timeout_seconds: float) -> None:
        """Refuses new steps with DRAINING and waits for the others, at most so long."""
        self._draining = True
        await asyncio.to_thread(self._wait_until_idle, timeout_seconds)

    # --- callers' side ------------------------------------------------------------------------------------------

    def _enqueue(self, call: StepCall) -> Future[StepOutcome]:
        job = Job(call, time.monotonic())
        with self._wake:
            if self._draining or self._stopping:
                raise Unavailable(Reason.DRAINING, "the service is about to stop", retry_after_seconds=1.0)
            if self._num_unfinished >= self.limits.max_queue:
                raise OutOfRoom(
                    Reason.QUEUE_FULL,
                    f"{self._num_unfinished} steps are waiting, the limit is {self.limits.max_queue}",
                    retry_after_seconds=0.1,
                )
            self._num_unfinished += 1
            self._inbox.append(job)
            self._wake.notify_all()
        return job.future

    async def _ask(self, question: Callable[[], T]) -> T:
        """Runs `question` in the worker thread, between forwards."""
        answer: Future[T] = Future()

        def run() -> None:
            is_awaited = answer.set_running_or_notify_cancel()
            try:
                result = question()
            except Exception as error:
                if is_awaited:
                    answer.set_exception(error)
            else:
                if is_awaited:
                    answer.set_result(result)

        with self._wake:
            if self._stopping:
                raise Unavailable(Reason.DRAINING, "the service is about to stop", retry_after_seconds=1.0)
            self._inbox.append(run)
            self._wake.notify_all()
        return await asyncio.wrap_future(answer)

    def _wait_until_idle(self, timeout_seconds: float) -> None:
        with self._wake:
            self._wake.wait_for(lambda: self._num_unfinished == 0, timeout_seconds)

    # --- worker thread ------------------------------------------------------------------------------------------

    def _work(self) -> None:
        with torch.inference_mode():
            while self._collect():
                self._admit_waiting()
                chunks = self._compose()
                if chunks:
                    self._execute(chunks)
        for job in [*self._running, *self._waiting]:
            self._fail(job, Unavailable(Reason.DRAINING, "the service has stopped", retry_after_seconds=1.0))

    def _collect(self) -> bool:
        """Takes what has arrived, waiting if there is nothing to do; False once the engine stops."""
        with self._wake:
            while not (self._inbox or self._running or self._waiting or self._stopping):
                self._wake.wait()
            if self._waiting and not (self._inbox or self._running):
                self._wake.wait(timeout=0.01)
            arrived = list(self._inbox)
            self._inbox.clear()
        for item in arrived:
            if isinstance(item, Job):
                self._waiting.append(item)
            else:
                item()
        return not self._stopping

    def _admit_waiting(self) -> None:
        """Readies the sessions of waiting steps; those without room go on waiting for a while.

        Nobody takes room before somebody who has waited longer for it; steps that need none pass.
        """
        is_room_awaited = False
        for _ in range(len(self._waiting)):
            job = self._waiting.popleft()
            now = time.monotonic()
            if not self._is_wanted(job, now):
                continue
            if is_room_awaited and self._table.needs_room(job.call):
                self._waiting.append(job)
                continue
            try:
                job.session, job.num_cached = self._table.begin(job.call, now)
            except NoRoomYet:
                if now - job.arrived > self.limits.room_wait_seconds:
                    self._fail(job, room_taken(self.limits.kv_tokens))
                else:
                    self._waiting.append(job)
                    is_room_awaited = True
                continue
            except FusionRouteError as error:
                self._fail(job, error)
                continue
            self._cache.room(job.call.session_id, job.session.reserved_tokens, job.session.cached_length)
            job.num_fed = job.num_cached
            self._schedule.arrived(job, now)
            self._running.append(job)

    def _compose(self) -> list[Chunk]:
        """The next forward, of the steps that are still wanted."""
        now = time.monotonic()
        for job in list(self._running):
            if not self._is_wanted(job, now):
                self._running.remove(job)
                continue
            if job.num_left == 0:  # all cached, nothing wanted
                self._running.remove(job)
                self._succeed(job)
        return self._schedule.compose(self._running, now)

    def _execute(self, chunks: list[Chunk]) -> None:
        started = time.monotonic()
        try:
            output = self._forward(chunks)
        except Exception as error:
            fault = (
                error
                if isinstance(error, FusionRouteError)
                else InternalFault(Reason.INTERNAL, f"the forward failed: {type(error).__name__}: {error}")
            )
            for chunk in chunks:
                self._running.remove(chunk.job)
                self._spoiled(chunk.job, fault)
            return
        finally:
            self._num_forwards += 1
        seconds = time.monotonic() - started
        self._schedule.took(sum(chunk.num_tokens for chunk in chunks), seconds)
        row = 0
        for chunk in chunks:
            count = len(chunk.wanted)
            self._commit(chunk, output, slice(row, row + count), started, seconds, len(chunks))
            row += count

    def _forward(self, chunks: list[Chunk]) -> ForwardOutput:
        segments: list[Segment] = []
        token_ids: list[int] = []
        positions: list[int] = []
        wanted: list[int] = []
        for chunk in chunks:
            call, session = chunk.job.call, chunk.job.session
            assert session is not None
            past, column = session.cached_length, len(token_ids)
            cache = self._cache.room(call.session_id, session.reserved_tokens, past)
            count = chunk.stop - chunk.start
            segments.append(Segment(cache, past, column, column + count))
            token_ids.extend(chunk.job.token_ids[chunk.start : chunk.stop])
            positions.extend(range(past, past + count))
            wanted.extend(column + index - chunk.start for index in chunk.wanted)
        return self._model.forward(RaggedBatch(segments), token_ids, positions, wanted)

    def _commit(
        self,
        chunk: Chunk,
        output: ForwardOutput,
        rows: slice,
        started: float,
        seconds: float,
        batch_sessions: int,
    ) -> None:
        """Remembers what a forward has fed to a session, unless its logits are not finite."""
        job, session = chunk.job, chunk.job.session
        assert session is not None
        self._running.remove(job)
        mine = output.rows[rows]
        # One pass over the rows; element by element it would cost half a millisecond at 128k columns.
        if not torch.isfinite(mine.sum(dtype=torch.float32)):
            self._spoiled(job, _not_finite(job, session))
            return
        session.extend(job.token_ids[chunk.start : chunk.stop])
        job.num_fed = chunk.stop
        job.started = started if job.started is None else job.started
        job.forward_seconds += seconds
        job.num_forwards += 1
        job.max_batch_sessions = max(job.max_batch_sessions, batch_sessions)
        num_shown = len(chunk.wanted) - chunk.num_hidden
        if num_shown:
            job.rows.append(mine[:num_shown])
            if output.head_scores is not None:
                job.head_scores.append(output.head_scores[rows][:num_shown])
        if not job.num_left and job.call.draft is not None:
            self._draft(job, mine[-1])
        if job.num_left:
            self._running.append(job)
        else:
            self._succeed(job)

    def _draft(self, job: Job, row: Tensor) -> None:
        """Lets the model choose its own next token, unless the draft has come to its end."""
        draft, session = job.call.draft, job.session
        assert draft is not None and session is not None
        if len(job.drafted_ids) >= draft.num_tokens or not self._table.can_go_on(session, time.monotonic()):
            return
        choice = choose(row.float().numpy(), draft.sampling, session.cached_length)
        if choice.logprob >= draft.least_logprob:
            job.go_on(choice.token_id)

    def _spoiled(self, job: Job, fault: FusionRouteError) -> None:
        """Fails a step whose forward was no good; one that was drafting keeps what it has."""
        if job.is_drafting:
            job.end_draft()
            self._succeed(job)
        else:
            self._fail(job, fault)

    def _is_wanted(self, job: Job, now: float) -> bool:
        """Whether anybody still waits for the step; ends it if not."""
        if job.future.cancelled():
            self._finish(job)
            return False
        if job.call.deadline is not None and now > job.call.deadline:
            late = Unavailable(Reason.DEADLINE_PASSED, "the deadline passed before the step's turn came")
            self._fail(job, late)
            return False
        return True

    def _succeed(self, job: Job) -> None:
        session = job.session
        assert session is not None
        if job.rows:
            rows = job.rows[0] if len(job.rows) == 1 else torch.cat(job.rows)
        else:
            rows = torch.empty((0, self.facts.logits_width), dtype=self._model.model.dtype)
        outcome = StepOutcome(
            rows=rows,
            head_scores=torch.cat(job.head_scores) if job.head_scores else None,
            position=session.cached_length,
            num_computed_tokens=len(job.token_ids) - job.num_cached,
            queue_seconds=(job.started or time.monotonic()) - job.arrived,
            forward_seconds=job.forward_seconds,
            num_forwards=job.num_forwards,
            max_batch_sessions=job.max_batch_sessions,
            drafted_ids=tuple(job.drafted_ids),
        )
        self._finish(job)
        if job.future.set_running_or_notify_cancel():
            job.future.set_result(outcome)

    def _fail(self, job: Job, error: FusionRouteError) -> None:
        self._finish(job)
        if job.future.set_running_or_notify_cancel():
            # The traceback holds the frame that has raised it, and that one the job: they would go only together.
            job.future.set_exception(error.with_traceback(None))

    def _finish(self, job: Job) -> None:
        if job.session is not None:
            self._table.end(job.session, time.monotonic())
        with self._wake:
            self._num_unfinished -= 1
            self._wake.notify_all()


def _not_finite(job: Job, session: Session) -> InternalFault:
    return InternalFault(
        Reason.NON_FINITE_LOGITS,
        f"the model gave logits that are not finite for session {job.call.session_id!r} at position"
        f" {session.cached_length}; nothing was cached of this step",
    )
