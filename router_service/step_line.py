"""The way to one expert instance: its streams of steps, one after the other.

A stream that has ended, broken or grown old is replaced by the next step. The first one offers no memory for rows, as
to take it lasts some milliseconds; once it is there, a second stream with it takes over.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

import grpc
import numpy as np
import structlog
from numpy.typing import NDArray

from fusionroute import streamed_rows
from fusionroute.errors import FusionRouteError
from fusionroute.local_line import LineListener, LineRefused
from fusionroute.shared_memory import MemoryRefused, Place, RowMemory, remove_abandoned
from fusionroute.v1 import expert_pb2
from fusionroute.wire import check_shared, matrix_to_numpy
from router_service.step_stream import Call, NoStreams, StepStream

__all__ = ["NoStreams", "Reply", "StepLine"]

METHOD = "/fusionroute.v1.ExpertService/StepStream"
MAX_STREAM_SECONDS = 300.0
"""Older streams are replaced, so that a connection that was to be given up, or new certificates, are not held up."""

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Reply:
    """An expert's answer, and the place that its rows were given.

    Attributes:
        response: with the bytes of its rows or not.
        data: these bytes; None where they are in the response or in the place.
        place: None where the rows can only be in the response.
    """

    response: expert_pb2.StepResponse
    data: memoryview | None = None
    place: Place | None = None

    def rows(self, width: int) -> NDArray[np.float32]:
        """The rows [n, V], read-only; from shared memory without a copy. To be called once.

        Raises:
            InvalidRequest: they are not what was promised.
        """
        matrix = self.response.rows
        if self.place is None or not matrix.HasField("shared_offset"):
            if self.place is not None:
                self.place.give_back()
            return matrix_to_numpy(matrix, width, self.data)
        try:
            num_floats = check_shared(matrix, width, self.place.offset, self.place.num_bytes)
        except FusionRouteError:
            self.place.give_back()
            raise
        return self.place.floats(num_floats).reshape(matrix.num_rows, width)


class StepLine:
    """Streams to one instance, one after the other.

    Args:
        open_stream: makes a stream to it; see `streams_over`.
        address: of it, for people.
        memory_bytes: of the memory in which rows may come; 0 = none is offered.
        has_socket: whether messages may go over a socket of their own where memory is shared.
        max_stream_seconds: an older stream is replaced.
    """

    def __init__(
        self,
        open_stream: Callable[[], Call],
        address: str,
        *,
        memory_bytes: int = 0,
        has_socket: bool = False,
        max_stream_seconds: float = MAX_STREAM_SECONDS,
    ) -> None:
        self._open_stream = open_stream
        self._address = address
        self._memory_bytes = memory_bytes
        self._has_socket = has_socket
        self._max_stream_seconds = max_stream_seconds
        self._stream: StepStream | None = None
        self._retired: set[StepStream] = set()
        self._preparing: asyncio.Future[RowMemory] | None = None

    @property
    def shares_memory(self) -> bool:
        """Whether rows come through memory that both sides see, so that whole ones cost little."""
        return self._stream is not None and self._stream.shares_memory

    async def step(self, request: expert_pb2.StepRequest, deadline: float, rows_bytes: int = 0) -> Reply:
        """One step. Raises FusionRouteError; NoStreams when the expert knows no streams."""
        stream = self._current()
        waiting = stream.submit(request, deadline, rows_bytes)
        try:
            return Reply(*await waiting.future, waiting.place)
        except asyncio.CancelledError:
            stream.forget(waiting)
            raise

    def let_go(self, closing: expert_pb2.CloseSessionRequest) -> bool:
        """Tells of a session that nobody will step again. Returns whether there is a stream to tell it on."""
        if self._stream is None or not self._stream.takes_steps:
            return False
        self._stream.let_go(closing)
        return True

    async def close(self) -> None:
        """Ends all streams; steps that wait fail."""
        for stream in (self._stream, *self._retired):
            if stream is not None:
                await stream.close()
        self._stream = None
        if self._preparing is not None:
            with suppress(MemoryRefused):
                (await self._preparing).unlink()

    def _current(self) -> StepStream:
        """The stream to use now."""
        stream = self._stream
        lives = stream is not None and stream.takes_steps
        is_old = stream is not None and time.monotonic() - stream.opened_at > self._max_stream_seconds
        if stream is not None and stream.was_refused_memory:
            self._memory_bytes = 0  # the expert is on another host
        if stream is not None and lives and not is_old and (stream.has_offered or not self._memory_bytes):
            return stream
        memory = self._prepared()
        # What is there serves until a memory to offer is ready.
        if stream is None or not lives or memory is not None or not self._memory_bytes:
            self._stream = self._open(memory)
            if stream is not None:
                self._retire(stream)
            return self._stream
        return stream

    def _prepared(self) -> RowMemory | None:
        """A memory to offer; None while it is being made, or where there can be none."""
        if not self._memory_bytes:
            return None
        loop = asyncio.get_running_loop()
        if self._preparing is None:
            self._preparing = loop.run_in_executor(None, _new_memory, self._memory_bytes)
        if not self._preparing.done():
            return None
        preparing, self._preparing = self._preparing, None
        try:
            memory = preparing.result()
            memory.publish()
        except MemoryRefused as error:
            log.info("rows_by_message", peer=self._address, message=str(error))
            self._memory_bytes = 0
            return None
        return memory

    def _open(self, memory: RowMemory | None) -> StepStream:
        listener = None
        if memory is not None and self._has_socket:
            with suppress(LineRefused):
                listener = LineListener()
        return StepStream(self._open_stream(), self._address, memory, listener)

    def _retire(self, stream: StepStream) -> None:
        if not stream.takes_steps:
            return
        stream.retire()
        self._retired.add(stream)
        stream.on_end = self._retired.discard


def streams_over(channel: grpc.aio.Channel) -> Callable[[], Call]:
    """Makes streams of steps over a channel, whose answers are not copied when they are read."""
    method = channel.stream_stream(
        METHOD,
        request_serializer=expert_pb2.StepStreamRequest.SerializeToString,
        response_deserializer=streamed_rows.decode,
    )
    return method


def _new_memory(num_bytes: int) -> RowMemory:
    remove_abandoned()
    return RowMemory(num_bytes)
