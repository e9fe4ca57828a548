"""Where nobody is asked for a key, pages of strangers that run in a browser on this machine must not call.

A browser sends requests wherever a page tells it to, and only keeps the page from reading the answer. It says from
which page a request comes (`origin`), and by which name it has found this address (`host`).
"""

from __future__ import annotations

import ipaddress
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from router_service.http.errors import openai_body


class OwnPages:
    """Refuses what a browser sends for pages of other origins.

    Args:
        app: what is guarded.
        origins: whose pages may call beside our own, for example https://apps.example.com.
        is_local: whether only this machine reaches the port; then it has no other name than an address or localhost,
            and whoever comes by another was sent here by somebody's name server.
    """

    def __init__(self, app: ASGIApp, origins: tuple[str, ...], *, is_local: bool) -> None:
        self._app, self._origins, self._is_local = app, frozenset(origins), is_local
        self._names = {urlsplit(origin).hostname for origin in origins}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes on what is allowed."""
        if scope["type"] != "http" or not (why := self._why_not(Headers(scope=scope))):
            return await self._app(scope, receive, send)
        body = openai_body(403, f"{why}; the setting http_origins names who may", "origin_not_allowed")
        await JSONResponse(body, 403)(scope, receive, send)

    def _why_not(self, headers: Headers) -> str:
        """Empty where the request is allowed."""
        host, origin = headers.get("host", ""), headers.get("origin")
        if self._is_local and not self._is_own_name(host):
            return f"host = {host[:100]!r} is not this port's name"
        if origin is None or origin in self._origins or urlsplit(origin).netloc == host:
            return ""
        return f"pages of origin = {origin[:100]!r} may not call"

    def _is_own_name(self, host: str) -> bool:
        try:
            name = urlsplit(f"//{host}").hostname
        except ValueError:
            return False
        if name is None or name in self._names or name == "localhost" or name.endswith(".localhost"):
            return True
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return False
        return True
