"""Server-sent events: how they look on the wire, and the answer that consists of them."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from fusionroute.errors import FusionRouteError
from router_service.http.presence import ClientGone, unless_gone

DONE = b"data: [DONE]\n\n"
KEEP_ALIVE = b": keep-alive\n\n"
"""A comment, which clients skip: for proxies that close connections on which nothing is said."""
KEEP_ALIVE_SECONDS = 15.0
HEADERS = {"cache-control": "no-cache", "x-accel-buffering": "no"}


def to_json(value: object) -> str:
    """Compact JSON; NaN is nothing that JSON has."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)


def event(value: object, event_id: str = "") -> bytes:
    """One event whose data is a value as JSON.

    Args:
        value: for `json.dumps`.
        event_id: what a client sends as `Last-Event-ID` to go on behind this event; empty = none.
    """
    return event_of(to_json(value), event_id)


def event_of(data: str, event_id: str = "") -> bytes:
    """One event whose data is JSON already, in one line."""
    line = f"data: {data}\n\n"
    text = f"id: {event_id}\n{line}" if event_id else line
    return text.encode("utf-8", errors="replace")


class EventStream(Response):
    """An answer whose status is decided by what comes first: an event, or an error.

    Args:
        parts: events, as bytes; closed at the end, and when the client leaves.
        early_error: the answer to an error before the first part.
        late_error: the last part when an error comes later.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        parts: AsyncGenerator[bytes, None],
        early_error: Callable[[FusionRouteError], Response],
        late_error: Callable[[FusionRouteError], bytes],
    ) -> None:
        super().__init__(headers=HEADERS)
        del self.headers["content-length"]
        self._parts = parts
        self._early_error, self._late_error = early_error, late_error

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends the answer. What a client misses that has left is no error."""
        has_begun = False

        async def say(part: bytes) -> None:
            nonlocal has_begun
            if not has_begun:
                has_begun = True
                await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            await send({"type": "http.response.body", "body": part, "more_body": True})

        try:
            async with unless_gone(receive), aclosing(self._parts) as parts:
                try:
                    async for part in parts:
                        await say(part)
                except FusionRouteError as error:
                    if not has_begun:
                        await self._early_error(error)(scope, receive, send)
                        return
                    await say(self._late_error(error))
        except ClientGone:
            if not has_begun:
                raise
            return
        await send({"type": "http.response.body", "body": b"", "more_body": False})
