"""Every request but the question for health and the page itself needs a key, where keys are configured."""

from __future__ import annotations

import time

import structlog
from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from fusionroute.access_check import HEADER, LOG_PAUSE_SECONDS, shown_key
from fusionroute.api_keys import ApiKeys
from router_service.http.errors import openai_body

log = structlog.get_logger(__name__)


class KeysAsked:
    """Refuses requests without `authorization: Bearer KEY`, before their body is read.

    Args:
        app: what is guarded.
        keys: what is accepted.
        open_paths: for which nobody is asked; those that end with a slash, but the root, stand for all below them too.
    """

    def __init__(self, app: ASGIApp, keys: ApiKeys, open_paths: tuple[str, ...]) -> None:
        self._app, self._keys, self._open_paths = app, keys, open_paths
        self._num_refused, self._logged_at = 0, -LOG_PAUSE_SECONDS

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes on what is allowed."""
        if scope["type"] != "http" or self._is_open(scope):
            return await self._app(scope, receive, send)
        shown = shown_key([(HEADER, value) for value in Headers(scope=scope).getlist(HEADER)])
        name = None if shown is None else self._keys.name_of(shown)
        if name is not None:
            structlog.contextvars.bind_contextvars(caller=name)
            return await self._app(scope, receive, send)
        what = "the key is not known here" if shown else "a key is needed: authorization: Bearer KEY"
        self._note(scope, what)
        body = openai_body(401, what, "invalid_api_key")
        await JSONResponse(body, 401, {"www-authenticate": "Bearer"})(scope, receive, send)

    def _is_open(self, scope: Scope) -> bool:
        path: str = scope["path"]
        return scope["method"] in ("GET", "HEAD") and any(
            path == each or (len(each) > 1 and each.endswith("/") and path.startswith(each))
            for each in self._open_paths
        )

    def _note(self, scope: Scope, what: str) -> None:
        """One line a second at most: whoever knocks must not be able to fill the disk."""
        self._num_refused += 1
        now = time.monotonic()
        if now - self._logged_at >= LOG_PAUSE_SECONDS:
            peer = (scope.get("client") or ("unknown",))[0]
            log.warning(
                "http_access_denied",
                path=scope["path"][:100],
                peer=peer,
                message=what,
                num_refused=self._num_refused,
            )
            self._logged_at, self._num_refused = now, 0
