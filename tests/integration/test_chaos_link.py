"""A link that is cut passes nothing, and one that is slow passes everything, later."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from tests.chaos.link import Link

Connection = tuple[asyncio.StreamReader, asyncio.StreamWriter]
LAST = 9.0
"""Seconds, and the sign that nothing else will be asked."""


@asynccontextmanager
async def echo_behind_a_link() -> AsyncIterator[Link]:
    """A link in front of a server that says everything back."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while data := await reader.read(1000):
                writer.write(data)
                await writer.drain()
        except ConnectionError:
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    async with Link("echo", lambda: f"127.0.0.1:{port}") as link:
        yield link
    server.close()
    await server.wait_closed()


async def connect(link: Link) -> Connection:
    host, _, port = link.address.rpartition(":")
    return await asyncio.open_connection(host, int(port))


async def answer_to(connection: Connection, question: bytes, seconds: float = 10.0) -> bytes | None:
    """What comes back; empty when the connection was ended; None when nothing came in time."""
    reader, writer = connection
    try:
        async with asyncio.timeout(seconds):
            writer.write(question)
            await writer.drain()
            return await reader.read(100)
    except TimeoutError:
        return None
    except ConnectionError:
        return b""
    finally:
        if seconds == LAST:
            writer.close()


async def test_a_cut_link_passes_nothing_until_it_heals() -> None:
    async with echo_behind_a_link() as link:
        odd, even = await connect(link), await connect(link)
        assert await answer_to(odd, b"a") == b"a" and await answer_to(even, b"b") == b"b"
        link.cut()
        assert await answer_to(odd, b"c", 0.2) is None and await answer_to(even, b"d", 0.2) is None
        link.heal()
        assert await answer_to(odd, b"e", LAST) == b"", "every other connection is reset"
        assert await answer_to(even, b"f", LAST) in (b"d", b"df"), "and the others deliver what was kept back"


async def test_a_cut_link_refuses_new_connections_or_leaves_them_hanging() -> None:
    async with echo_behind_a_link() as link:
        link.cut()
        refused, hanging = await connect(link), await connect(link)
        assert await answer_to(refused, b"a", LAST) == b""
        assert await answer_to(hanging, b"b", 0.2) is None
        link.heal()
        assert await answer_to(hanging, b"", LAST) == b"b"


async def test_a_slow_link_answers_later_by_as_much_as_it_says() -> None:
    async with echo_behind_a_link() as link:
        connection = await connect(link)
        for _ in range(5):
            await answer_to(connection, b"a")
        delay = link.slow_down(100.0, most_seconds=0.4)
        assert 0 < delay <= 0.4 and delay >= min(0.4, 100 * link.usual_seconds) * 0.99
        started = time.monotonic()
        assert await answer_to(connection, b"b") == b"b"
        assert time.monotonic() - started >= delay
        link.heal()
        assert await answer_to(connection, b"c", LAST) == b"c"
