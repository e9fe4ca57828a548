"""A connection between two parts that can be made slow or be cut: a TCP proxy on loopback.

    fair     bytes pass, each piece a little later if `base_delay_seconds` says so
    slow     pieces wait on their way, in both directions
    cut      nothing passes; new connections are refused, every other one is left hanging instead. When the
             cut heals, every other connection delivers what it kept back (as TCP does) and the others are reset
"""

from __future__ import annotations

import asyncio
import socket
import statistics
import struct
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from enum import Enum
from types import TracebackType
from typing import Self

PIECE_BYTES = 1 << 16
NUM_LATENCIES = 400
HANG_SECONDS = 60.0
"""A connection that was begun during a cut and never served is closed after so long."""


class Weather(Enum):
    """What a link does with bytes."""

    FAIR = "fair"
    SLOW = "slow"
    CUT = "cut"


@dataclass(slots=True, eq=False)
class _Connection:
    number: int
    client: asyncio.StreamWriter
    server: asyncio.StreamWriter | None = None
    asked_at: float | None = None
    was_cut: bool = False


@dataclass(slots=True, eq=False)
class Link:
    """A proxy in front of one service. Use as an asynchronous context manager.

    Attributes:
        name: for people, for example "router-1>redis".
        target: where the service is now, host:port or the path of a unix socket; None while it is down.
        base_delay_seconds: each piece waits so long in fair weather, so that generations last.
    """

    name: str
    target: Callable[[], str | None]
    base_delay_seconds: float = 0.0
    weather: Weather = Weather.FAIR
    slow_seconds: float = 0.0
    num_cut: int = 0
    _latencies: deque[float] = field(default_factory=lambda: deque(maxlen=NUM_LATENCIES))
    _healed: asyncio.Event = field(default_factory=asyncio.Event)
    _server: asyncio.Server | None = None
    _port: int = 0
    _connections: set[_Connection] = field(default_factory=set)
    _tasks: set[asyncio.Task[None]] = field(default_factory=set)
    _num_accepted: int = 0

    @property
    def address(self) -> str:
        """host:port to which clients connect; the same for as long as the link lasts."""
        return f"127.0.0.1:{self._port}"

    @property
    def usual_seconds(self) -> float:
        """Median time from a question to the first bytes of its answer, in fair weather."""
        return statistics.median(self._latencies) if self._latencies else 0.0

    def slow_down(self, factor: float, most_seconds: float) -> float:
        """Answers take `factor` times as long as usual from now on, at most so many seconds more. Returns the delay."""
        total = min(max(self.usual_seconds, 0.0005) * factor, most_seconds)
        self.slow_seconds = total / 2
        self.weather = Weather.SLOW
        return total

    def cut(self) -> None:
        """Nothing passes from now on."""
        self.weather = Weather.CUT
        self._healed.clear()
        self.num_cut += len(self._connections)
        for connection in self._connections:
            connection.was_cut = True

    def heal(self) -> None:
        """Fair weather again."""
        was_cut = self.weather is Weather.CUT
        self.weather = Weather.FAIR
        if was_cut:
            for connection in list(self._connections):
                if connection.number % 2:
                    _reset(connection)
        self._healed.set()

    async def __aenter__(self) -> Self:
        self._healed.set()
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self._port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._server is not None
        self._server.close()
        for connection in list(self._connections):
            _reset(connection)
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._server.wait_closed()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        self._num_accepted += 1
        connection = _Connection(self._num_accepted, writer)
        self._connections.add(connection)
        try:
            await self._serve(connection, reader)
        except (OSError, TimeoutError):
            pass  # a broken connection is all in a day's work here
        except asyncio.CancelledError:
            pass  # only we cancel, at the end; the stream protocol would complain about it
        finally:
            _reset(connection)
            self._connections.discard(connection)

    async def _serve(self, connection: _Connection, reader: asyncio.StreamReader) -> None:
        if self.weather is Weather.CUT:
            if connection.number % 2:
                return
            async with asyncio.timeout(HANG_SECONDS):
                await self._healed.wait()
        target = self.target()
        if target is None:
            return
        if target.startswith("/"):
            from_server, connection.server = await asyncio.open_unix_connection(target)
        else:
            host, _, port = target.rpartition(":")
            from_server, connection.server = await asyncio.open_connection(host, int(port))
        there = asyncio.create_task(self._pump(connection, reader, connection.server, is_question=True))
        back = asyncio.create_task(self._pump(connection, from_server, connection.client, is_question=False))
        try:
            await asyncio.wait([there, back], return_when=asyncio.FIRST_COMPLETED)
        finally:
            for pump in (there, back):
                pump.cancel()
            await asyncio.gather(there, back, return_exceptions=True)

    async def _pump(
        self,
        connection: _Connection,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        *,
        is_question: bool,
    ) -> None:
        with suppress(OSError):
            while data := await reader.read(PIECE_BYTES):
                self._note_latency(connection, is_question=is_question)
                await self._endure()
                writer.write(data)
                await writer.drain()
            await self._endure()  # the end of a connection passes no cut either

    async def _endure(self) -> None:
        delay = self.slow_seconds if self.weather is Weather.SLOW else self.base_delay_seconds
        if delay:
            await asyncio.sleep(delay)
        while self.weather is Weather.CUT:
            await self._healed.wait()

    def _note_latency(self, connection: _Connection, *, is_question: bool) -> None:
        if self.weather is not Weather.FAIR:
            connection.asked_at = None
        elif is_question:
            connection.asked_at = connection.asked_at or time.monotonic()
        elif connection.asked_at is not None:
            # the base delay of the way back is still to come
            self._latencies.append(time.monotonic() - connection.asked_at + self.base_delay_seconds)
            connection.asked_at = None


def _reset(connection: _Connection) -> None:
    """Ends a connection at both ends the hard way: RST, nothing is flushed."""
    for writer in (connection.client, connection.server):
        if writer is None:
            continue
        sock = writer.get_extra_info("socket")
        with suppress(OSError, AttributeError):
            if sock.family in (socket.AF_INET, socket.AF_INET6):
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        writer.transport.abort()
