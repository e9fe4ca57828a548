"""What every HTTP port of a daemon has in common."""

from __future__ import annotations

import asyncio
import socket

from fusionroute.http_server import serving_http


async def test_small_pieces_are_sent_at_once() -> None:
    delays: list[int] = []

    async def application(scope, receive, send):
        for transport in _transports():
            delays.append(transport.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
        await send({"type": "http.response.start", "status": 204, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    def _transports() -> list[socket.socket]:
        """The server's ends of the connections to its port."""
        port = int(address.rpartition(":")[2])
        loop = asyncio.get_running_loop()
        served = [each.get_extra_info("socket") for each in loop._transports.values()]  # type: ignore[attr-defined]
        return [each for each in served if each is not None and each.getsockname()[1] == port]

    async with serving_http(application, "127.0.0.1", 0, port_field="port") as address:
        host, _, port = address.rpartition(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(b"GET / HTTP/1.1\r\nhost: localhost\r\n\r\n")
        async with asyncio.timeout(10):
            assert (await reader.readline()).startswith(b"HTTP/1.1 204")
        writer.close()
        await writer.wait_closed()
    assert delays and all(delays)
