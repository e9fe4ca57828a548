"""Steps to one expert instance over a long-lived stream.

    steps that become ready in one turn of the event loop -> one message -> the expert
    all that the expert has ended at a moment             <- one message <-

A stream that ends or breaks fails its steps; `StepLine` opens the next one.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from contextvars import Context
from dataclasses import dataclass
from typing import Any, TypeAlias

import grpc
import structlog
from google.protobuf.message import Message

from fusionroute import tracing
from fusionroute.background import end_task
from fusionroute.errors import FusionRouteError, Reason, Unavailable
from fusionroute.local_line import LineListener, MessageLine
from fusionroute.lone_caller import LoneCaller
from fusionroute.rpc_context import current_request
from fusionroute.rpc_errors import TRANSPORT, error_from_peer
from fusionroute.shared_memory import Place, RowMemory
from fusionroute.streamed_rows import StreamedAnswer, StreamedAnswers, decode
from fusionroute.v1 import common_pb2, expert_pb2
from fusionroute.wire import step_error_from_message

MAX_MESSAGE_STEPS = 256
MAX_MESSAGE_TOKENS = 65_536
MAX_MESSAGE_CANCELLED = 4096
MAX_MESSAGE_CLOSINGS = 1024
MAX_LINE_BYTES = 2**31
"""Of one answer over a line, which comes from a process of our own user."""

log = structlog.get_logger(__name__)

Call: TypeAlias = "grpc.aio.StreamStreamCall[Message, StreamedAnswers]"


def _nothing(stream: StepStream) -> None:
    """Nobody wants to know."""


class NoStreams(Exception):
    """The expert does not know streams; nothing has happened."""


@dataclass(slots=True, eq=False)
class Waiting:
    """A step that is not answered yet.

    Attributes:
        future: its answer; done already where nobody waits for it any more.
        place: where its rows may be, the expert's until the answer is there.
        timer: ends the waiting.
        is_sent: whether the expert may have heard of it.
    """

    step_id: int
    future: asyncio.Future[tuple[expert_pb2.StepResponse, memoryview | None]]
    place: Place | None = None
    timer: asyncio.TimerHandle | None = None
    is_sent: bool = False


class StepStream:
    """One stream, from its making on.

    Attributes:
        opened_at: time.monotonic() when it was made.
        was_refused_memory: the expert cannot map what was offered.
        on_end: hears that it has ended.

    Args:
        call: the stream as gRPC made it.
        address: of the expert, for people.
        memory: to offer; None = rows come in messages.
        listener: where the expert may connect to carry messages without gRPC; None = nowhere.
    """

    def __init__(
        self, call: Call, address: str, memory: RowMemory | None, listener: LineListener | None = None
    ) -> None:
        self._call = call
        self._listener = listener
        self._line: MessageLine | None = None  # once the expert has shown the proof
        self._is_flushing = False
        self._address = address
        self._offered = memory
        self._has_offered = memory is not None
        self.was_refused_memory = False
        self.on_end: Callable[[StepStream], None] = _nothing
        self._memory: RowMemory | None = None  # once the expert has accepted it
        self._ids = itertools.count(1)
        self._waiting: dict[int, Waiting] = {}
        self._steps: deque[expert_pb2.StreamedStep] = deque()
        self._cancelled: list[int] = []
        self._closings: deque[expert_pb2.CloseSessionRequest] = deque()
        self._lone = LoneCaller()
        self._wake = asyncio.Event()
        self._first_by_line = 0
        self._cancelled_before: list[int] = []  # of steps that went before there was a line
        self._is_retired = False
        self._error: FusionRouteError | NoStreams | None = None
        self.opened_at = time.monotonic()
        # The stream is nobody's in particular: log lines of its tasks must not name the turn that opened it.
        self._writing = asyncio.create_task(self._write(), name=f"steps to {address}", context=Context())
        self._reading = asyncio.create_task(self._read(), name=f"rows of {address}", context=Context())
        self._connecting: asyncio.Task[None] | None = None
        if listener is not None and memory is not None:
            self._connecting = asyncio.create_task(
                self._connect(listener, memory.proof), name=f"line to {address}", context=Context()
            )
            # Not within the task: one that is cancelled before its first step does nothing at all.
            self._connecting.add_done_callback(lambda _: listener.close())

    @property
    def shares_memory(self) -> bool:
        """Whether rows come through memory that the expert has accepted."""
        return self._memory is not None

    @property
    def has_offered(self) -> bool:
        """Whether it has begun with an offer of memory."""
        return self._has_offered

    @property
    def takes_steps(self) -> bool:
        """Whether it can be used for a further step."""
        return self._error is None and not self._is_retired

    def submit(self, request: expert_pb2.StepRequest, deadline: float, rows_bytes: int) -> Waiting:
        """Sends a step.

        Args:
            request: the step; its `dtype` is changed when its rows come through shared memory.
            deadline: on the clock of time.monotonic().
            rows_bytes: what its rows need at most as float32.
        """
        loop = asyncio.get_running_loop()
        seconds = max(0.001, deadline - time.monotonic())
        waiting = Waiting(next(self._ids), loop.create_future())
        streamed = expert_pb2.StreamedStep(
            id=waiting.step_id,
            step=request,
            timeout_seconds=seconds,
            request_id=current_request(),
            traceparent=tracing.traceparent() if tracing.is_on() else "",
        )
        if rows_bytes and self._memory is not None and (place := self._memory.place(rows_bytes)) is not None:
            waiting.place = place
            streamed.shared_offset, streamed.shared_bytes = place.offset, place.num_bytes
            streamed.step.dtype = common_pb2.DTYPE_FLOAT32  # read where they stand, without a copy
        waiting.timer = loop.call_later(seconds, self._expire, waiting)
        self._waiting[waiting.step_id] = waiting
        self._steps.append(streamed)
        self._lone.came(request.session_id)
        if self._line is not None and len(self._waiting) == 1 and self._lone.is_(request.session_id):
            self._flush()  # there is nobody to share a message with
        else:
            self._go_on()
        return waiting

    def let_go(self, closing: expert_pb2.CloseSessionRequest) -> None:
        """Tells of a session that nobody will step again, with whatever goes next; it is not answered."""
        self._closings.append(closing)
        self._go_on()

    def forget(self, waiting: Waiting) -> None:
        """Nobody waits for a step any more. Its place stays the expert's until the expert has let go of it."""
        if waiting.timer is not None:
            waiting.timer.cancel()
        if waiting.step_id in self._waiting:
            if waiting.is_sent and waiting.step_id < self._first_by_line:
                self._cancelled_before.append(waiting.step_id)
                self._wake.set()
            elif waiting.is_sent:
                self._cancelled.append(waiting.step_id)
                self._go_on()
            else:
                self._drop(waiting)
        elif waiting.place is not None and _has_answer(waiting.future):
            waiting.place.give_back()  # the answer came in the moment in which its caller was cancelled

    def _drop(self, waiting: Waiting) -> None:
        """A step that the expert has never heard of."""
        del self._waiting[waiting.step_id]
        if waiting.place is not None:
            waiting.place.give_back()
        self._wake.set()

    def retire(self) -> None:
        """Takes no further steps and ends when those that it has are answered."""
        self._is_retired = True
        self._wake.set()

    async def close(self) -> None:
        """Ends it now; steps that wait fail."""
        self._flush()
        self._end(_gone(f"the connection to {self._address} was closed"))
        await end_task(self._writing)
        await end_task(self._reading)
        if self._connecting is not None:
            await end_task(self._connecting)
        self._call.cancel()

    # --- going out -------------------------------------------------------------------------------------------------

    def _go_on(self) -> None:
        """There is something to send: at the end of this turn of the event loop, with all that is added until then."""
        if self._line is None:
            self._wake.set()
        elif not self._is_flushing:
            self._is_flushing = True
            asyncio.get_running_loop().call_soon(self._flush)

    def _flush(self) -> None:
        self._is_flushing = False
        while self._line is not None and self._line.is_open and self._has_more():
            if (message := self._next()) is not None:
                self._line.send(message.SerializeToString())

    async def _connect(self, listener: LineListener, proof: bytes) -> None:
        """Takes the expert's connection, over which everything goes from then on."""
        line = await listener.accept(proof, MAX_LINE_BYTES)
        if self._error is not None:
            line.close()
            return
        self._line = line
        # A cancellation must not overtake its step: those of earlier steps go where these went.
        self._first_by_line = next(self._ids)
        line.listen(self._received, self._lost_line)
        self._go_on()

    async def _write(self) -> None:
        # What becomes of a stream that cannot be written to, the reader learns.
        with suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError, grpc.aio.UsageError):
            await self._call.write(self._first())
            while True:
                while self._line is None and self._has_more():
                    if (message := self._next()) is not None:
                        await self._call.write(message)
                if self._is_retired and not self._waiting:
                    await self._call.done_writing()
                    return
                if self._cancelled_before:
                    cancelled, self._cancelled_before = self._cancelled_before, []
                    await self._call.write(expert_pb2.StepStreamRequest(cancelled=cancelled))
                    continue
                self._wake.clear()
                await self._wake.wait()

    def _first(self) -> expert_pb2.StepStreamRequest:
        message = self._next() or expert_pb2.StepStreamRequest()
        if self._offered is not None:
            message.shared_memory.name = self._offered.name
            message.shared_memory.num_bytes = self._offered.num_bytes
            message.shared_memory.proof = self._offered.proof
            if self._listener is not None:
                message.shared_memory.line_address = self._listener.address
        return message

    def _has_more(self) -> bool:
        return bool(self._steps or self._cancelled or self._closings)

    def _next(self) -> expert_pb2.StepStreamRequest | None:
        """All that is ready, as far as one message holds it; None if it is wanted no more."""
        steps: list[expert_pb2.StreamedStep] = []
        num_tokens = 0
        while self._steps and len(steps) < MAX_MESSAGE_STEPS and num_tokens < MAX_MESSAGE_TOKENS:
            streamed = self._steps.popleft()
            waiting = self._waiting.get(streamed.id)
            if waiting is not None:
                waiting.is_sent = True
                steps.append(streamed)
                num_tokens += len(streamed.step.token_ids)
        cancelled = self._cancelled[:MAX_MESSAGE_CANCELLED]
        del self._cancelled[:MAX_MESSAGE_CANCELLED]
        most = min(len(self._closings), MAX_MESSAGE_CLOSINGS)
        closings = [self._closings.popleft() for _ in range(most)]
        if not (steps or cancelled or closings):
            return None
        return expert_pb2.StepStreamRequest(steps=steps, cancelled=cancelled, closings=closings)

    # --- coming in -------------------------------------------------------------------------------------------------

    async def _read(self) -> None:
        error: FusionRouteError | NoStreams = _gone(f"{self._address} has ended the stream")
        is_first = True
        try:
            async for response in self._call:
                if is_first:
                    is_first = False
                    self._greeted(response)
                for answer in response.answers:
                    self._answered(answer)
        except grpc.aio.AioRpcError as broken:
            is_unknown = broken.code() is grpc.StatusCode.UNIMPLEMENTED
            error = NoStreams() if is_unknown else error_from_peer(broken, self._address)
        except asyncio.CancelledError:
            # By `close`, or by a channel that is closed and cancels its calls.
            error = _gone(f"the connection to {self._address} was closed")
            raise
        except Exception:
            log.exception("stream_unreadable", peer=self._address)
            error = _gone(f"{self._address} sent what is no answer")
            self._call.cancel()
        finally:
            self._end(error)

    def _greeted(self, response: StreamedAnswers) -> None:
        if self._offered is not None:
            self._offered.unlink()
            self.was_refused_memory = not response.shared_memory_accepted
            if response.shared_memory_accepted:
                self._memory = self._offered
            elif self._connecting is not None:
                self._connecting.cancel()  # nobody will come
            self._offered = None

    def _received(self, message: bytes) -> None:
        """An answer over the line."""
        for answer in decode(message).answers:
            self._answered(answer)

    def _lost_line(self) -> None:
        self._call.cancel()
        self._end(_gone(f"{self._address} has ended the line"))

    def _answered(self, answer: StreamedAnswer) -> None:
        waiting = self._waiting.pop(answer.step_id, None)
        if waiting is None:
            return
        if waiting.timer is not None:
            waiting.timer.cancel()
        is_wanted = not waiting.future.done()
        if self._is_retired and not self._waiting:
            self._wake.set()
        if answer.result.WhichOneof("result") == "response":
            if is_wanted:
                waiting.future.set_result((answer.result.response, answer.data))
                return
        elif is_wanted:
            waiting.future.set_exception(step_error_from_message(answer.result.error))
        if waiting.place is not None:
            waiting.place.give_back()

    def _expire(self, waiting: Waiting) -> None:
        if not waiting.future.done():
            waiting.future.set_exception(
                Unavailable(
                    Reason.DEADLINE_PASSED,
                    f"{self._address}: no answer in time",
                    metadata={TRANSPORT: "DEADLINE_EXCEEDED"},
                )
            )
        self.forget(waiting)

    def _end(self, error: FusionRouteError | NoStreams) -> None:
        """Fails all steps; the memory is given up with the stream, whatever the expert may still write there."""
        if self._error is not None:
            return
        self._error = error
        if self._offered is not None:
            self._offered.unlink()
        self._offered = self._memory = None
        if self._line is not None:
            self._line.close()
        if self._connecting is not None:
            self._connecting.cancel()
        for waiting in self._waiting.values():
            if waiting.timer is not None:
                waiting.timer.cancel()
            if not waiting.future.done():
                waiting.future.set_exception(
                    error.afresh() if isinstance(error, FusionRouteError) else NoStreams()
                )
        self._waiting.clear()
        self._steps.clear()
        self._cancelled.clear()
        self._closings.clear()
        self._writing.cancel()
        self.on_end(self)


def _has_answer(future: asyncio.Future[Any]) -> bool:
    return future.done() and not future.cancelled() and future.exception() is None


def _gone(message: str) -> Unavailable:
    return Unavailable(Reason.EXPERT_UNAVAILABLE, message, metadata={TRANSPORT: "UNAVAILABLE"})
