"""One expert asked directly: by unary calls, on a stream with or without shared memory, over a socket."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from itertools import count

import grpc
import numpy as np
from numpy.typing import NDArray

from fusionroute.grpc_runtime import MAX_MESSAGE_BYTES, channel
from fusionroute.local_line import LineListener, MessageLine
from fusionroute.shared_memory import Place, RowMemory
from fusionroute.streamed_rows import StreamedAnswer, decode
from fusionroute.v1 import expert_pb2, expert_pb2_grpc
from fusionroute.v1.common_pb2 import DTYPE_FLOAT32
from fusionroute.wire import matrix_to_numpy

CALL_SECONDS = 30.0


@dataclass(frozen=True, slots=True)
class Reply:
    """A step's answer as its caller would use it.

    Attributes:
        best: id with the highest logit.
        data: bytes of rows beside the response.
    """

    response: expert_pb2.StepResponse
    best: int
    data: memoryview | None = None

    @property
    def num_bytes(self) -> int:
        """In messages."""
        return self.response.ByteSize() + (0 if self.data is None else self.data.nbytes)


class ExpertWire:
    """One expert, asked directly over one connection."""

    def __init__(self, connection: grpc.aio.Channel, width: int) -> None:
        self._stub = expert_pb2_grpc.ExpertServiceStub(connection)
        self.width = width
        self._ids = count(1)

    @classmethod
    @asynccontextmanager
    async def open(cls, address: str) -> AsyncIterator[ExpertWire]:
        """Connected for as long as the block lasts."""
        async with channel(address) as connection:
            stub = expert_pb2_grpc.ExpertServiceStub(connection)
            info = await stub.GetInfo(expert_pb2.GetInfoRequest(), timeout=CALL_SECONDS)
            yield cls(connection, info.model.logits_width)

    async def unary(self, request: expert_pb2.StepRequest) -> Reply:
        """One call of Step."""
        response = await self._stub.Step(request, timeout=CALL_SECONDS)
        return Reply(response, _best(matrix_to_numpy(response.rows, self.width)[0]))

    async def close_session(self, session_id: str) -> None:
        """Forgets a session."""
        request = expert_pb2.CloseSessionRequest(session_id=session_id)
        await self._stub.CloseSession(request, timeout=CALL_SECONDS)

    @asynccontextmanager
    async def stream(self, *, shares_memory: bool) -> AsyncIterator[WireStream]:
        """A stream of steps for as long as the block lasts."""
        call = self._stub.StepStream()
        memory = RowMemory(8 * 4 * self.width) if shares_memory else None
        try:
            stream = WireStream(call, self.width, self._ids, memory)
            await stream.greet()
            yield stream
        finally:
            if memory is not None:
                memory.unlink()
            call.cancel()

    @asynccontextmanager
    async def line(self, *, shares_memory: bool) -> AsyncIterator[WireLine]:
        """The socket that takes a stream's place on one host.

        Args:
            shares_memory: rows come through the memory, as they do as long as there is room, and not in messages.
        """
        call, memory, listener = self._stub.StepStream(), RowMemory(8 * 4 * self.width), LineListener()
        line: MessageLine | None = None
        try:
            stream = WireStream(call, self.width, self._ids, memory)
            async with asyncio.timeout(CALL_SECONDS):
                await stream.greet(listener.address)
                line = await listener.accept(memory.proof, MAX_MESSAGE_BYTES)
            yield WireLine(line, self.width, self._ids, memory if shares_memory else None)
        finally:
            listener.close()
            if line is not None:
                line.close()
            memory.unlink()
            call.cancel()


class WireStream:
    """Steps one after the other on a long-lived stream."""

    def __init__(
        self,
        call: grpc.aio.StreamStreamCall[expert_pb2.StepStreamRequest, expert_pb2.StepStreamResponse],
        width: int,
        ids: Iterator[int],
        memory: RowMemory | None,
    ) -> None:
        self._call, self._width, self._ids, self._memory = call, width, ids, memory

    async def greet(self, line_address: str = "") -> None:
        """Sends the first message, with the offer of memory and of a line if there is one."""
        first = expert_pb2.StepStreamRequest()
        if self._memory is not None:
            self._memory.publish()
            offer = first.shared_memory
            offer.name, offer.num_bytes = self._memory.name, self._memory.num_bytes
            offer.proof = self._memory.proof
            offer.line_address = line_address
        await self._call.write(first)
        answer = await self._read()
        if self._memory is not None:
            self._memory.unlink()
            if not answer.shared_memory_accepted:
                raise RuntimeError(
                    "the expert cannot map the memory that is offered, although it is on this host"
                )

    async def step(self, request: expert_pb2.StepRequest) -> Reply:
        """One step; its rows where the stream has them."""
        message, place = _message(request, next(self._ids), self._width, self._memory)
        await self._call.write(message)
        result = (await self._read()).results[0].result
        if result.WhichOneof("result") != "response":
            raise RuntimeError(f"the expert refused a step: {result.error.message}")
        response = result.response
        if place is not None:
            return Reply(response, _best(place.floats(self._width)))
        if response.HasField("top"):
            return Reply(response, int(np.frombuffer(response.top.ids, "<u4")[0]))
        return Reply(response, _best(matrix_to_numpy(response.rows, self._width)[0]))

    async def _read(self) -> expert_pb2.StepStreamResponse:
        async with asyncio.timeout(CALL_SECONDS):
            answer = await self._call.read()
        assert isinstance(answer, expert_pb2.StepStreamResponse), "the expert has ended the stream"
        return answer


class WireLine:
    """Steps one after the other over a socket."""

    def __init__(self, line: MessageLine, width: int, ids: Iterator[int], memory: RowMemory | None) -> None:
        self._line, self._width, self._ids, self._memory = line, width, ids, memory
        self._answer: asyncio.Future[StreamedAnswer] | None = None
        line.listen(self._received, self._lost)

    async def step(self, request: expert_pb2.StepRequest) -> Reply:
        """One step; its rows in shared memory or in the message."""
        message, place = _message(request, next(self._ids), self._width, self._memory)
        self._answer = asyncio.get_running_loop().create_future()
        self._line.send(message.SerializeToString())
        async with asyncio.timeout(CALL_SECONDS):
            answer = await self._answer
        if answer.result.WhichOneof("result") != "response":
            raise RuntimeError(f"the expert refused a step: {answer.result.error.message}")
        response = answer.result.response
        if place is not None:
            return Reply(response, _best(place.floats(self._width)))
        return Reply(response, _best(matrix_to_numpy(response.rows, self._width, answer.data)[0]), answer.data)

    def _received(self, message: bytes) -> None:
        assert self._answer is not None
        self._answer.set_result(decode(message).answers[0])

    def _lost(self) -> None:
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(RuntimeError("the expert has ended the line"))


def _message(
    request: expert_pb2.StepRequest, number: int, width: int, memory: RowMemory | None
) -> tuple[expert_pb2.StepStreamRequest, Place | None]:
    """The message of one step, and the place for its row; None = the row comes in the answer."""
    streamed = expert_pb2.StreamedStep(id=number, step=request, timeout_seconds=CALL_SECONDS)
    place = None if memory is None else memory.place(4 * width)
    if place is not None:
        streamed.shared_offset, streamed.shared_bytes = place.offset, place.num_bytes
        streamed.step.dtype = DTYPE_FLOAT32
    return expert_pb2.StepStreamRequest(steps=[streamed]), place


def _best(row: NDArray[np.float32]) -> int:
    return int(row.argmax())
