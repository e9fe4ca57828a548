"""Bodies of requests are read up to a limit: whatever is larger is refused before it is in memory."""

from __future__ import annotations

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from router_service.http.errors import openai_body


class _TooLarge(Exception):
    """The body has more bytes than allowed."""


class BodyLimit:
    """Answers 413 where a body is larger than allowed, announced or not.

    Args:
        app: what reads bodies.
        max_bytes: of a body.
    """

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self._app, self._max_bytes = app, max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes on what is not too large."""
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        announced = Headers(scope=scope).get("content-length", "")
        if announced.isdecimal() and int(announced) > self._max_bytes:
            return await self._refuse(scope, receive, send)
        num_bytes, has_begun = 0, False

        async def counted() -> Message:
            nonlocal num_bytes
            message = await receive()
            num_bytes += len(message.get("body", b""))
            if num_bytes > self._max_bytes:
                raise _TooLarge
            return message

        async def watched(message: Message) -> None:
            nonlocal has_begun
            has_begun = True
            await send(message)

        try:
            await self._app(scope, counted, watched)
        except _TooLarge:
            if not has_begun:
                await self._refuse(scope, receive, send)

    async def _refuse(self, scope: Scope, receive: Receive, send: Send) -> None:
        message = f"the body is larger than {self._max_bytes} bytes"
        body = openai_body(413, message, "request_too_large")
        await JSONResponse(body, 413, {"connection": "close"})(scope, receive, send)
