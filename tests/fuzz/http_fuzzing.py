"""Sends malformed HTTP to a watch port and counts the answers by status."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from prometheus_client import CollectorRegistry

from fusionroute.grpc_runtime import server
from fusionroute.metrics import Exposition
from fusionroute.settings import DaemonSettings
from fusionroute.watch_server import Watched, watching
from tests.fuzz.fuzzing import Tally
from tests.fuzz.http_requests import KEY, PATHS, Drawn, draw

IN_FLIGHT = 48
REQUEST_SECONDS = 0.3
"""How long the server waits for the rest of a request."""
HANGING_SECONDS = 30.0
QUIET_SECONDS = 0.1
MOST_SILENT = 150
"""Connections that are held open with half a request in them, more than the server keeps."""
_STATUS = re.compile(rb"HTTP/1\.1 (\d{3}) ")


class FuzzedSettings(DaemonSettings):
    """Of no particular daemon."""

    table = "router"


class OneKey:
    """Accepts one key."""

    def name_of(self, shown: bytes) -> str | None:
        return "probe" if shown == KEY.encode() else None


async def _nothing() -> None:
    """All metrics are at hand."""


@asynccontextmanager
async def watched_daemon(
    request_seconds: float = REQUEST_SECONDS, refresh: Callable[[], Awaitable[object]] = _nothing
) -> AsyncIterator[str]:
    """A watch port, HOST:PORT, before a server that is well."""
    async with server([]) as running:
        exposition = Exposition(CollectorRegistry())
        watched = Watched(running.health, exposition, refresh, keys=OneKey(), request_seconds=request_seconds)
        async with watching(FuzzedSettings(watch_port=0), watched) as address:
            assert address is not None
            yield address


@dataclass
class Complaints(logging.Handler):
    """What the server logs as its own errors, and what its event loop catches."""

    found: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__(logging.ERROR)

    def __hash__(self) -> int:
        return id(self)

    def emit(self, record: logging.LogRecord) -> None:
        cause = record.exc_info[1] if record.exc_info else None
        self.found.append(f"{record.getMessage().strip()}: {cause!r}")

    @contextlib.contextmanager
    def heard(self) -> Iterator[None]:
        """Listens within the context."""
        loop, logger = asyncio.get_running_loop(), logging.getLogger("uvicorn.error")
        before = loop.get_exception_handler()

        def caught(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
            self.found.append(f"{context['message']}: {context.get('exception')!r}")

        loop.set_exception_handler(caught)
        logger.addHandler(self)
        try:
            yield
        finally:
            logger.removeHandler(self)
            loop.set_exception_handler(before)


async def fuzz_http(address: str, count: int, seed: int = 0) -> Tally:
    """Sends `count` malformed requests, a connection for each."""
    rng, tally, places = random.Random(seed), Tally(), asyncio.Semaphore(IN_FLIGHT)
    complaints = Complaints()

    async def one(drawn: Drawn) -> None:
        async with places:
            await _send(address, drawn, tally)

    with complaints.heard():
        await asyncio.gather(*(one(draw(rng)) for _ in range(count)))
        await asyncio.sleep(0.05)
    for words in complaints.found:
        tally.faults["logged", words[:200]] += 1
        tally.examples.setdefault(("logged", words[:200]), b"")
    return tally


async def _send(address: str, drawn: Drawn, tally: Tally) -> None:
    try:
        async with asyncio.timeout(HANGING_SECONDS):
            answer = await exchange(address, drawn.data, finishes=not drawn.is_half)
    except TimeoutError:
        tally.num_hanging += 1
        tally.statuses[drawn.kind.value, "hanging"] += 1
        return
    statuses = [status.decode() for status in _STATUS.findall(answer)] or ["closed"]
    for status in statuses:
        tally.statuses[drawn.kind.value, status] += 1
        if status.startswith("5"):
            fault = drawn.kind.value, f"{status}: {answer[:160]!r}"
            tally.faults[fault] += 1
            tally.examples.setdefault(fault, drawn.data)


async def exchange(address: str, data: bytes, *, finishes: bool = True) -> bytes:
    """Everything that comes back until the server hangs up.

    Args:
        finishes: nothing more is expected once an answer has come and nothing follows it; else what ends the wait
            is the server.
    """
    host, port = address.rsplit(":", 1)
    reader, writer = await asyncio.open_connection(host, int(port))
    answer = bytearray()
    try:
        with contextlib.suppress(ConnectionError):
            writer.write(data)
            while piece := await _read(reader, QUIET_SECONDS if answer and finishes else HANGING_SECONDS):
                answer += piece
    finally:
        writer.transport.abort()
    return bytes(answer)


async def _read(reader: asyncio.StreamReader, seconds: float) -> bytes:
    """What comes next; nothing when it is the end, or when it is quiet."""
    try:
        async with asyncio.timeout(seconds):
            return await reader.read(65536)
    except TimeoutError:
        if seconds == HANGING_SECONDS:
            raise
        return b""


async def is_live(address: str) -> bool:
    """Whether /livez says so to a new caller within its deadline."""
    async with asyncio.timeout(HANGING_SECONDS):
        answer = await exchange(address, b"GET /livez HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
    return answer.startswith(b"HTTP/1.1 200 ")


async def normal_answers(address: str) -> list[bytes]:
    """Status lines of what a caller who does nothing wrong is told."""
    head = f"Host: x\r\nAuthorization: Bearer {KEY}\r\nConnection: close\r\n\r\n"
    answers = [await exchange(address, f"GET {path} HTTP/1.1\r\n{head}".encode()) for path in PATHS]
    return [answer.partition(b"\r\n")[0] for answer in answers]


@asynccontextmanager
async def silent_connections(address: str, data: bytes, count: int = MOST_SILENT) -> AsyncIterator[None]:
    """Holds connections open within the context that have sent `data` and send no more."""
    host, port = address.rsplit(":", 1)
    writers = []
    try:
        for _ in range(count):
            _, writer = await asyncio.open_connection(host, int(port))
            writers.append(writer)
            writer.write(data)
        await asyncio.sleep(0.05)
        yield
    finally:
        for writer in writers:
            writer.transport.abort()


HALVES = (b"", b"GET /livez HT", b"POST /livez HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n1")
