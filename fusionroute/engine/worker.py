"""The engine's worker: packs the waiting steps of many sessions into one forward after another.

    admit -> compose a tick -> forward -> commit -> answer

Everything here happens in one thread, which owns the sessions and their caches.
"""

from __future__ import annotations

import time
from asyncio import Future
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from threading import Lock
from typing import TypeVar

import torch
from torch import Tensor

from fusionroute.engine.expectation import Expectation
from fusionroute.engine.hand_over import Answers, Inbox, SettledByLoop, deliver, settle
from fusionroute.engine.idle_heap import IdleHeap
from fusionroute.engine.kept_outcomes import KeptOutcomes
from fusionroute.engine.model import ForwardOutput, LoadedModel
from fusionroute.engine.packing import joined, run_packed
from fusionroute.engine.schedule import SHORT_TOKENS, Schedule
from fusionroute.engine.session import StepCall
from fusionroute.engine.sessions import NoRoomYet, SessionTable, room_taken
from fusionroute.engine.sharing import DONORS_SHARE, Sharing
from fusionroute.engine.steps import Chunk, EngineLimits, Job, StepOutcome, not_finite
from fusionroute.errors import FusionRouteError, InternalFault, Reason, Unavailable
from fusionroute.fusion import choose
from fusionroute.number_formats import are_finite, as_float32

T = TypeVar("T")

ROOM_POLL_SECONDS = 0.01
QUICK_TOKENS = 4


class Worker:
    """What the worker thread does and knows.

    Args:
        model: runs the forwards.
        limits: what may be used.

    Attributes:
        expectation: who will step again soon, and in what groups.
        inbox: steps, and questions to be answered between forwards.
        num_finished: steps that have ended, one way or another.
        num_forwards: forwards that have run.
    """

    def __init__(self, model: LoadedModel, limits: EngineLimits) -> None:
        self.limits = limits
        self.inbox: Inbox[Job | Callable[[], None]] = Inbox()
        self.num_finished = 0
        self.num_forwards = 0
        self.is_stopping = False
        self._model = model
        self._cache = model.kv_cache()
        self._kept = KeptOutcomes()
        self.expectation = Expectation(in_groups=limits.in_groups)
        self.table = SessionTable(
            kv_tokens=limits.kv_tokens,
            max_sessions=limits.max_sessions,
            max_context_tokens=model.facts.max_context_tokens,
            logits_width=model.facts.logits_width,
            epoch=model.facts.epoch,
            free=self._cache.free,
            sharing=Sharing(self._cache, limits.shortest_shared_tokens, limits.kv_tokens // DONORS_SHARE)
            if limits.share_prefixes
            else None,
            # Not a method of its own: a worker that has ended, and with it the model, is to be free at once.
            forget=_forgetting(self._kept, self.expectation),
        )
        self._answers = Answers()
        self._waiting: deque[Job] = deque()  # for room
        self._running: list[Job] = []  # admitted, not all fed
        self._idle_awaited: list[Future[None]] = []
        self._turn = Lock()  # held by who works: this thread, or for quick steps the caller's
        self._num_received = 0
        self._quick_seconds = limits.quick_seconds if model.runs_in_any_thread else 0.0
        self._schedule = Schedule(limits)
        self._heap = IdleHeap()

    def work(self) -> None:
        """Serves until it is told to stop; what is left then is refused."""
        with torch.inference_mode():
            while not self.is_stopping:
                # Not delivered within the turn: whoever is woken may want it at once. Nor is anything of it kept in a
                # name here, where it would live until the next step comes.
                deliver(self._take_turn(self._collect()))
        for job in [*self._running, *self._waiting]:
            self._fail(job, Unavailable(Reason.DRAINING, "the service has stopped", retry_after_seconds=1.0))
        self._collect_the_rest()
        self._tell_idle()
        deliver(self._answers.take())

    def is_quick(self, call: StepCall) -> bool:
        """Whether a step takes less than waking a thread for it is worth, and has no others to share a forward with.

        For any thread; to be asked again while its turn is held, as `run_here` does.
        """
        num_tokens = len(call.token_ids)
        return (
            num_tokens <= QUICK_TOKENS
            and call.from_position > 0
            and call.draft is None
            and self._quick_seconds > 0.0
            and self.expectation.cost.seconds(num_tokens) < self._quick_seconds
            and self.expectation.lone.is_(call.session_id)
        )

    def run_here(self, job: Job) -> bool:
        """Runs a quick step in the calling thread, if the worker has nothing to do; its future is settled then.

        Returns:
            Whether it was taken.
        """
        if not self._turn.acquire(blocking=False):
            return False
        settled: SettledByLoop = {}
        try:
            if self._running or self._waiting or self._num_received != self.inbox.num_put:
                return False
            with torch.inference_mode():
                self._waiting.append(job)
                self._admit_waiting()
                while chunks := self._compose():
                    self._execute(chunks)
            settled = self._answers.take()
            return True
        finally:
            self._turn.release()
            settle(settled.pop(job.future.get_loop(), []))
            deliver(settled)

    def _take_turn(self, items: list[Job | Callable[[], None]]) -> SettledByLoop:
        """At most one forward; what it has settled."""
        with self._turn:
            self._receive(items)
            self._admit_waiting()
            if self.limits.await_others:
                self._await_others()
            chunks = self._compose()
            if chunks:
                self._execute(chunks)
            if not (self._running or self._waiting):
                self._tell_idle()
            return self._answers.take()

    def stop(self) -> None:
        """Called in the worker thread: this turn of `work` is the last."""
        self.is_stopping = True

    def tell_when_idle(self, future: Future[None]) -> None:
        """Called in the worker thread: settles the future once no step waits or runs."""
        self._idle_awaited.append(future)

    def answer(self, future: Future[T], question: Callable[[], T]) -> None:
        """Settles a question's future with its answer."""
        try:
            self._answers.add(future, question())
        except Exception as error:
            self._answers.add(future, None, error)

    def _collect(self) -> list[Job | Callable[[], None]]:
        """What has arrived; waits for it if there is nothing to do."""
        if self._running:
            return self.inbox.take(0.0)
        if self._waiting:
            return self.inbox.take(ROOM_POLL_SECONDS)
        items = self.inbox.take(self._heap.wait_seconds(len(self.table)))
        if not items:
            self._heap.trim(len(self.table))
        return items

    def _receive(self, items: list[Job | Callable[[], None]]) -> None:
        self._num_received += len(items)
        for item in items:
            if isinstance(item, Job):
                self._waiting.append(item)
            else:
                item()

    def _await_others(self) -> None:
        """Gives sessions that are about to step again a moment, where one forward for all is worth it."""
        give_up: float | None = None
        num_before = len(self._running)
        while self._running and all(job.num_left <= SHORT_TOKENS for job in self._running):
            now = time.monotonic()
            give_up = give_up or now + self.expectation.cost.line()[0]
            wait_seconds = min(self.expectation.wait_seconds(len(self._running), now), give_up - now)
            if wait_seconds <= 0.0:
                return
            items = self.inbox.take(wait_seconds)
            if not items:
                self.expectation.waited_in_vain(others_came=len(self._running) > num_before)
                return
            self._receive(items)
            self._admit_waiting()

    def _collect_the_rest(self) -> None:
        for item in self.inbox.take(0.0):
            if isinstance(item, Job):
                self._fail(
                    item, Unavailable(Reason.DRAINING, "the service has stopped", retry_after_seconds=1.0)
                )
            else:
                item()

    def _tell_idle(self) -> None:
        for future in self._idle_awaited:
            self._answers.add(future, None)
        self._idle_awaited.clear()

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
            if is_room_awaited and self.table.needs_room(job.call):
                self._waiting.append(job)
                continue
            try:
                self._admit(job, now)
            except NoRoomYet:
                if now - job.arrived > self.limits.room_wait_seconds:
                    self._fail(job, room_taken(self.limits.kv_tokens))
                else:
                    self._waiting.append(job)
                    is_room_awaited = True
            except FusionRouteError as error:
                self._fail(job, error)

    def _admit(self, job: Job, now: float) -> None:
        """Raises what `SessionTable.begin` raises."""
        call = job.call
        again = self._kept.again(call, self.table.check(call))
        if again is not None:
            self.table.touch(call, now)
            self._settle(job, again)
            return
        self._kept.forget(call.session_id)
        job.session, job.num_cached = self.table.begin(call, now)
        self._cache.room(call.session_id, job.session.reserved_tokens, job.session.cached_length)
        job.num_fed = job.num_cached
        self._schedule.arrived(job, now)
        if call.from_position > 0 and job.num_left <= SHORT_TOKENS:
            self.expectation.stepped(call.session_id, job.arrived)
        self._running.append(job)

    def _compose(self) -> list[Chunk]:
        """The next forward, of the steps that are still wanted."""
        if not self._running:
            return []
        now = time.monotonic()
        still_running: list[Job] = []
        for job in self._running:
            if not self._is_wanted(job, now):
                continue
            if job.num_left:
                still_running.append(job)
            else:  # all cached, nothing wanted
                self._succeed(job)
        self._running = still_running
        return self._schedule.compose(still_running, now, self.expectation.group_size)

    def _execute(self, chunks: list[Chunk]) -> None:
        started, processor_started = time.monotonic(), time.thread_time()
        served = {id(chunk.job) for chunk in chunks}
        self._running = [job for job in self._running if id(job) not in served]
        try:
            output = run_packed(self._model, self._cache, chunks)
            finite = are_finite(output.rows)
        except Exception as error:
            told = InternalFault(Reason.INTERNAL, f"the forward failed: {type(error).__name__}: {error}")
            for chunk in chunks:
                self._spoiled(chunk.job, error if isinstance(error, FusionRouteError) else told)
            return
        finally:
            self.num_forwards += 1
        seconds = time.monotonic() - started
        num_tokens = sum(chunk.num_tokens for chunk in chunks)
        self._schedule.took(num_tokens, seconds)
        processor_seconds = time.thread_time() - processor_started if self._model.runs_in_one_thread else seconds
        self.expectation.computed(num_tokens, seconds, processor_seconds, started + seconds)
        self._heap.computed(num_tokens)
        row = 0
        for chunk in chunks:
            job, rows = chunk.job, slice(row, row + len(chunk.wanted))
            row = rows.stop
            if not all(finite[rows]):
                self._spoiled(job, not_finite(job))
                continue
            job.started = started if job.started is None else job.started
            job.forward_seconds += seconds
            job.num_forwards += 1
            job.max_batch_sessions = max(job.max_batch_sessions, len(chunks))
            self._commit(chunk, output, rows)

    def _commit(self, chunk: Chunk, output: ForwardOutput, rows: slice) -> None:
        """Remembers what a forward has fed to a session."""
        job, session = chunk.job, chunk.job.session
        assert session is not None
        self.table.extend(session, job.token_ids[chunk.start : chunk.stop])
        job.num_fed = chunk.stop
        shown = slice(rows.start, rows.stop - chunk.num_hidden)
        if shown.stop > shown.start:
            job.rows.append(output.rows[shown])
            if output.head_scores is not None:
                job.head_scores.append(output.head_scores[shown])
        if not job.num_left and job.call.draft is not None:
            self._draft(job, output.rows[rows.stop - 1])
        if job.num_left:
            self._running.append(job)
        else:
            self._succeed(job)

    def _draft(self, job: Job, row: Tensor) -> None:
        """Lets the model choose its own next token, unless the draft has come to its end."""
        draft, session = job.call.draft, job.session
        assert draft is not None and session is not None
        if len(job.drafted_ids) >= draft.num_tokens or not self.table.can_go_on(session, time.monotonic()):
            return
        choice = choose(as_float32(row), draft.sampling, session.cached_length)
        if choice.logprob >= draft.least_logprob and choice.token_id not in draft.end_ids:
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
        outcome = StepOutcome(
            rows=joined(job.rows) if job.rows else self._no_rows(),
            head_scores=joined(job.head_scores) if job.head_scores else None,
            position=session.cached_length,
            num_computed_tokens=len(job.token_ids) - job.num_cached,
            queue_seconds=(job.started or time.monotonic()) - job.arrived,
            forward_seconds=job.forward_seconds,
            num_forwards=job.num_forwards,
            max_batch_sessions=job.max_batch_sessions,
            drafted_ids=tuple(job.drafted_ids),
        )
        if job.call.keep_rows:
            self._kept.keep(job.call, session, replace(outcome))
        self._settle(job, outcome)

    def _settle(self, job: Job, outcome: StepOutcome) -> None:
        self._finish(job)
        self.expectation.answered(job.call.session_id, time.monotonic())
        self._answers.add(job.future, outcome)

    def _fail(self, job: Job, error: FusionRouteError) -> None:
        self._finish(job)
        # The traceback holds the frame that has raised it, and that one the job: they would go only together.
        self._answers.add(job.future, None, error.with_traceback(None))

    def _finish(self, job: Job) -> None:
        if job.session is not None:
            self.table.end(job.session, time.monotonic())
        self.num_finished += 1

    def _no_rows(self) -> Tensor:
        return torch.empty((0, self._model.facts.logits_width), dtype=self._model.model.dtype)


def _forgetting(kept: KeptOutcomes, expectation: Expectation) -> Callable[[str], None]:
    def forget(session_id: str) -> None:
        kept.forget(session_id)
        expectation.forget(session_id)

    return forget
