"""Bodies of requests are read up to a limit: whatever is larger is refused before it is in memory."""

from __future__ import annotations

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

TOO_LARGE = 413
PATIENCE = 4
"""Of a body that is too large, so many times the limit are read and thrown away."""


class BodyLimit:
    """Answers 413 where a body is larger than allowed, announced or not.

    Args:
        app: what reads bodies, and turns HTTPException into answers.
        max_bytes: of a body.
    """

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self._app, self._max_bytes = app, max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes on what is not too large."""
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        announced = Headers(scope=scope).get("content-length", "")
        is_announced = announced.isdecimal() and int(announced) > self._max_bytes
        num_bytes = 0

        async def counted() -> Message:
            nonlocal num_bytes
            message = await receive()
            num_bytes += len(message.get("body", b""))
            if not is_announced and num_bytes <= self._max_bytes:
                return message
            # Clients that still send when the connection closes see a reset instead of the answer.
            while message.get("more_body") and num_bytes < PATIENCE * self._max_bytes:
                message = await receive()
                num_bytes += len(message.get("body", b""))
            raise self._refusal()

        await self._app(scope, counted, send)

    def _refusal(self) -> HTTPException:
        what = f"the body is larger than {self._max_bytes} bytes"
        return HTTPException(TOO_LARGE, what, {"connection": "close"})
