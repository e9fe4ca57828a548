"""A stream of steps: what one message brings is begun at once, all that has ended meanwhile goes out in one message.

    reading task                         the engine                    the stream's generator
    message -> begin each step  ------->  forward  ----> _settle ----> one message with all that has ended

Every step is answered exactly once: when its future is done, whether it succeeded, failed, was cancelled by the
caller or ran out of time. Only a stream that breaks answers nothing; its steps are cancelled.
"""

from __future__ import annotations

import asyncio
import mmap
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from dataclasses import dataclass
from functools import partial
from typing import TypeAlias

import structlog
from google.protobuf.message import DecodeError

from expert_service import checks
from expert_service.stepping import BegunStep, PackRows, Stepping
from fusionroute.background import end_task
from fusionroute.engine import StepOutcome
from fusionroute.errors import OutOfRoom, Reason, StatusCode, Unavailable, invalid
from fusionroute.grpc_runtime import MAX_MESSAGE_BYTES
from fusionroute.local_line import LineRefused, MessageLine, connect_line
from fusionroute.rpc_context import StreamedCall
from fusionroute.rpc_errors import told
from fusionroute.shared_memory import MemoryRefused, open_memory
from fusionroute.streamed_rows import StreamedAnswer, StreamedAnswers, encode
from fusionroute.v1 import expert_pb2
from fusionroute.wire import SharedPlace, pack_rows, step_error_to_message

log = structlog.get_logger(__name__)

RPC = "ExpertService/Step"
"""Streamed steps are measured as what they are."""
MAX_UNANSWERED_STEPS = 1024
MAX_UNSENT_ANSWERS = 2 * MAX_UNANSWERED_STEPS
"""A caller who does not read its answers is not read from either."""
COALESCED_BYTES = 4 * 2**20
"""A message that is so large already takes no further answers; joining them would gain nothing."""

Requests: TypeAlias = AsyncIterator[expert_pb2.StepStreamRequest]
Responses: TypeAlias = AsyncGenerator[StreamedAnswers, None]


@dataclass(slots=True, eq=False)
class _Running:
    """A step that is not answered yet.

    Attributes:
        pack: puts its rows where the caller has room for them.
        given_up: why it was cancelled; None while it is wanted.
    """

    begun: BegunStep
    call: StreamedCall
    pack: PackRows
    timer: asyncio.TimerHandle | None = None
    given_up: expert_pb2.StepError | None = None

    def give_up(self, why: expert_pb2.StepError) -> None:
        """Nobody waits for it any more; it is answered when the engine has let go of it."""
        if self.given_up is None:
            self.given_up = why
            self.begun.future.cancel()


class StepStream:
    """One caller's stream.

    Args:
        stepping: begins steps.
        on_end: hears that the stream has ended.
        takes_lines: whether the caller's offer of a line is taken.
    """

    def __init__(
        self, stepping: Stepping, on_end: Callable[[StepStream], None], *, takes_lines: bool = True
    ) -> None:
        self._stepping = stepping
        self._on_end = on_end
        self._takes_lines = takes_lines
        self._running: dict[int, _Running] = {}
        self._ended: deque[StreamedAnswer] = deque()
        self._must_greet = False
        self._wake = asyncio.Event()
        self._was_sent = asyncio.Event()
        self._ends_when_idle = False
        self._memory: mmap.mmap | None = None
        self._line: MessageLine | None = None
        self._is_flushing = False
        self._fault: Exception | None = None

    def end_when_idle(self) -> None:
        """Ends the stream as soon as every step that has been read is answered."""
        self._ends_when_idle = True
        self._wake.set()

    async def answers(self, requests: Requests) -> Responses:
        """What goes out, until the caller ends the stream or breaks it off.

        Raises:
            InvalidRequest: a message was none, or was larger than one may be, or named an id twice.
        """
        reading = asyncio.create_task(self._read(requests), name="steps of a stream")
        reading.add_done_callback(lambda _: self._wake.set())
        try:
            while True:
                await self._wake.wait()
                self._wake.clear()
                while (response := self._next()) is not None:
                    yield response
                    self._was_sent.set()
                if self._fault is not None:
                    raise self._fault
                if reading.done():
                    reading.result()
                if not self._running and (reading.done() or self._ends_when_idle):
                    return
        finally:
            self._on_end(self)
            await end_task(reading)
            if self._line is not None:
                self._line.close()
            for running in list(self._running.values()):
                running.give_up(_CANCELLED)

    # --- coming in -------------------------------------------------------------------------------------------------

    async def _read(self, requests: Requests) -> None:
        is_first = True
        async for request in requests:
            checks.check_streamed(request)
            if is_first:
                is_first = False
                self._greet(request)
            self._take(request)
            if self._can_connect(request):
                await self._connect(request.shared_memory)
            while len(self._ended) > MAX_UNSENT_ANSWERS:
                self._was_sent.clear()
                await self._was_sent.wait()

    def _take(self, request: expert_pb2.StepStreamRequest) -> None:
        for streamed in request.steps:
            self._begin(streamed)
        for step_id in request.cancelled:  # of this very message too
            running = self._running.get(step_id)
            if running is not None:
                running.give_up(_CANCELLED)
        if request.closings:
            self._stepping.let_go(request.closings)

    def _can_connect(self, request: expert_pb2.StepStreamRequest) -> bool:
        is_offered = self._takes_lines and bool(request.shared_memory.line_address)
        return is_offered and self._memory is not None and self._line is None

    async def _connect(self, offer: expert_pb2.SharedMemoryOffer) -> None:
        """From then on messages go over the line; the stream itself only says when all is over."""
        try:
            line = await connect_line(offer.line_address, offer.proof, MAX_MESSAGE_BYTES)
        except LineRefused as refused:
            log.info("no_line", message=str(refused))
            return
        self._line = line
        line.listen(self._received, self._lost_line)

    def _received(self, message: bytes) -> None:
        """A message over the line."""
        try:
            request = expert_pb2.StepStreamRequest.FromString(message)
            checks.check_streamed(request)
            self._is_flushing = True  # in a moment, with all that this message ends at once
            self._take(request)
            self._flush()
        except DecodeError:
            self._end_by(invalid("line", f"{len(message)} bytes", "a message as the contract defines it"))
        except Exception as error:
            self._end_by(error)

    def _lost_line(self) -> None:
        self._end_by(Unavailable(Reason.DRAINING, "the caller has ended the line"))

    def _end_by(self, fault: Exception) -> None:
        self._fault = self._fault or fault
        self._wake.set()

    def _greet(self, request: expert_pb2.StepStreamRequest) -> None:
        if request.HasField("shared_memory"):
            self._memory = _opened(request.shared_memory)
        self._must_greet = True
        self._wake.set()

    def _begin(self, streamed: expert_pb2.StreamedStep) -> None:
        if streamed.id in self._running:
            raise invalid("id", streamed.id, "differs from those of all steps that are not answered")
        call = StreamedCall(RPC, streamed.request_id, streamed.traceparent)
        try:
            checks.check_streamed_step(streamed)
            self._check_room()
            pack = self._place_of(streamed)
            running = _Running(call.run(partial(self._hand_over, streamed)), call, pack)
        except Exception as error:
            self._fail(streamed.id, call, error)
            return
        self._running[streamed.id] = running
        if running.begun.future.done():
            self._settle(streamed.id, running.begun.future)
            return
        if streamed.timeout_seconds:
            loop = asyncio.get_running_loop()
            running.timer = loop.call_later(streamed.timeout_seconds, running.give_up, _TOO_LATE)
        running.begun.future.add_done_callback(partial(self._settle, streamed.id))

    def _hand_over(self, streamed: expert_pb2.StreamedStep) -> BegunStep:
        timeout_seconds = streamed.timeout_seconds
        return self._stepping.begin(streamed.step, timeout_seconds=timeout_seconds or None)

    def _place_of(self, streamed: expert_pb2.StreamedStep) -> PackRows:
        """Where the rows of a step go. Raises InvalidRequest when that is not within the memory."""
        if self._memory is None or not streamed.HasField("shared_offset"):
            return pack_rows
        return SharedPlace(self._memory, streamed.shared_offset, streamed.shared_bytes).pack

    def _check_room(self) -> None:
        if len(self._running) >= MAX_UNANSWERED_STEPS:
            raise OutOfRoom(
                Reason.QUEUE_FULL,
                f"{len(self._running)} steps of this stream are not answered, the limit is {MAX_UNANSWERED_STEPS}",
                retry_after_seconds=0.1,
            )

    # --- going out -------------------------------------------------------------------------------------------------

    def _settle(self, step_id: int, future: asyncio.Future[StepOutcome]) -> None:
        """A step has ended."""
        running = self._running.pop(step_id)
        if running.timer is not None:
            running.timer.cancel()
        try:
            response, data = running.call.run(partial(running.begun.answer, running.pack))
        except asyncio.CancelledError:
            why = running.given_up or _STOPPED
            running.call.end(StatusCode(why.code).name)
            self._put(StreamedAnswer(step_id, expert_pb2.StepResult(error=why)))
        except Exception as error:
            self._fail(step_id, running.call, error)
        else:
            running.call.end("OK")
            self._put(StreamedAnswer(step_id, expert_pb2.StepResult(response=response), data))

    def _fail(self, step_id: int, call: StreamedCall, error: Exception) -> None:
        ours = told(error, RPC)
        call.end(ours.code.name)
        self._put(StreamedAnswer(step_id, expert_pb2.StepResult(error=step_error_to_message(ours))))

    def _put(self, answer: StreamedAnswer) -> None:
        self._ended.append(answer)
        if self._line is None or not self._line.is_open:
            self._wake.set()
        elif not self._is_flushing:
            self._is_flushing = True
            asyncio.get_running_loop().call_soon(self._flush)

    def _flush(self) -> None:
        """All that has ended in this turn of the event loop, over the line."""
        self._is_flushing = False
        while self._line is not None and self._line.is_open and (answers := self._next()) is not None:
            self._line.send(encode(answers))
        if not self._running:
            self._wake.set()

    def _next(self) -> StreamedAnswers | None:
        """The next message: all that has ended, up to COALESCED_BYTES."""
        if not (self._ended or self._must_greet):
            return None
        answers: list[StreamedAnswer] = []
        num_bytes = 0
        while self._ended and num_bytes < COALESCED_BYTES:
            answers.append(self._ended.popleft())
            num_bytes += answers[-1].num_bytes
        is_accepted = self._must_greet and self._memory is not None
        self._must_greet = False
        return StreamedAnswers(is_accepted, answers)


def _opened(offer: expert_pb2.SharedMemoryOffer) -> mmap.mmap | None:
    try:
        return open_memory(offer.name, offer.num_bytes, offer.proof)
    except MemoryRefused as refused:
        log.info("rows_by_message", message=str(refused))
        return None


def _error(code: StatusCode, reason: str, message: str) -> expert_pb2.StepError:
    return expert_pb2.StepError(code=int(code), reason=reason, message=message)


_CANCELLED = _error(StatusCode.CANCELLED, "", "the caller has cancelled the step")
_TOO_LATE = step_error_to_message(Unavailable(Reason.DEADLINE_PASSED, "the step did not end in time"))
_STOPPED = step_error_to_message(
    Unavailable(Reason.DRAINING, "the service has stopped", retry_after_seconds=1.0)
)
