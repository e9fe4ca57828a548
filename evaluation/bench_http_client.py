"""Answers streamed over HTTP, read with as little as it takes: one open connection, chunks, events."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

ANSWER_SECONDS = 60.0
CLOSE_SECONDS = 5.0
DONE = b"[DONE]"

Asking = Callable[[str, int], Mapping[str, Any]]
"""The body of a greedy, streamed request: from a prompt and the number of new tokens at most."""
Reading = Callable[[Mapping[str, Any]], str | None]
"""The text of an event's token; None = the event has none."""


@dataclass(frozen=True, slots=True)
class Api:
    """One way to ask for a stream of tokens over HTTP."""

    path: str
    body: Asking
    text: Reading


@dataclass(slots=True)
class Streamed:
    """What one answer brought.

    Attributes:
        first_byte: of the answer, seconds after the request was sent.
        arrived: of each token's text, likewise.
    """

    first_byte: float = 0.0
    arrived: list[float] = field(default_factory=list)
    text: str = ""


def _completion_text(event: Mapping[str, Any]) -> str | None:
    choices = event["choices"]
    return (choices[0]["text"] or None) if choices else None


COMPLETIONS = Api(
    "/v1/completions",
    lambda prompt, num_tokens: {
        "model": "fusionroute",
        "prompt": prompt,
        "max_tokens": num_tokens,
        "temperature": 0,
        "stream": True,
    },
    _completion_text,
)
TGI = Api(
    "/generate_stream",
    lambda prompt, num_tokens: {"inputs": prompt, "parameters": {"max_new_tokens": num_tokens}},
    lambda event: event["token"]["text"],
)


class HttpConnection:
    """One connection that is kept open, for one request at a time."""

    def __init__(self, address: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._host, self._reader, self._writer = address, reader, writer

    @classmethod
    @asynccontextmanager
    async def open(cls, address: str) -> AsyncIterator[HttpConnection]:
        """To HOST:PORT, for as long as the block lasts."""
        host, _, port = address.rpartition(":")
        reader, writer = await asyncio.open_connection(host.strip("[]"), int(port))
        try:
            yield cls(address, reader, writer)
        finally:
            writer.close()
            with suppress(OSError, TimeoutError):
                async with asyncio.timeout(CLOSE_SECONDS):
                    await writer.wait_closed()

    async def stream(self, api: Api, prompt: str, num_tokens: int) -> Streamed:
        """One answer to its end.

        Raises:
            RuntimeError: the answer is no stream, or it ends in an error; the message holds it.
        """
        answer, started = Streamed(), time.perf_counter()
        async with asyncio.timeout(ANSWER_SECONDS):
            self._send(api.path, json.dumps(api.body(prompt, num_tokens)).encode())
            head = await self._reader.readuntil(b"\r\n\r\n")
            answer.first_byte = time.perf_counter() - started
            if not head.startswith(b"HTTP/1.1 200") or b"transfer-encoding: chunked" not in head.lower():
                raise RuntimeError(f"{api.path}: {head.decode(errors='replace').splitlines()[0]}")
            async for data in self._events():
                event = json.loads(data)
                if "error" in event:
                    raise RuntimeError(f"{api.path}: {event['error']}")
                text = api.text(event)
                if text is not None:
                    answer.arrived.append(time.perf_counter() - started)
                    answer.text += text
        return answer

    def _send(self, path: str, body: bytes) -> None:
        head = (
            f"POST {path} HTTP/1.1\r\nhost: {self._host}\r\ncontent-type: application/json\r\n"
            f"content-length: {len(body)}\r\n\r\n"
        )
        self._writer.write(head.encode() + body)

    async def _events(self) -> AsyncIterator[bytes]:
        """The data of each event but the last one, which says that it is the last."""
        unread = b""
        while size := int(await self._reader.readuntil(b"\r\n"), 16):
            chunk = await self._reader.readexactly(size + 2)
            *events, unread = (unread + chunk[:-2]).split(b"\n\n")
            for event in events:
                for line in event.split(b"\n"):
                    data = line.removeprefix(b"data:").strip()
                    if line.startswith(b"data:") and data != DONE:
                        yield data
        await self._reader.readuntil(b"\r\n")
