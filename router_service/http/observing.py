"""What every request gets: an id in its log lines and its answer, a measurement, a span."""

from __future__ import annotations

import re
import time

import structlog
from starlette.datastructures import Headers, MutableHeaders
from starlette.routing import BaseRoute
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fusionroute import tracing
from fusionroute.rpc_context import REQUEST_ID_KEY, bind_request, new_request_id
from fusionroute.telemetry import is_debugging
from router_service import metrics

UNTRACED = frozenset({"/health", "/ready", "/metrics", "/fusionroute/state"})
"""Asked again and again by probes and pages; a trace of each would hide the others."""
OTHER_ROUTE = "other"
"""The label of requests for what is not there: paths are the caller's, and labels must be few."""
GONE_STATUS = 499

log = structlog.get_logger(__name__)

_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")


class Observed:
    """Measures and names requests, and logs what nobody has caught.

    Args:
        app: what answers.
        routes: whose paths are labels.
    """

    def __init__(self, app: ASGIApp, routes: list[BaseRoute]) -> None:
        self._app = app
        self._paths = {
            str(path).partition("/{")[0] for route in routes if (path := getattr(route, "path", ""))
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes everything on."""
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        headers = Headers(scope=scope)
        given = headers.get(REQUEST_ID_KEY, "")
        request_id = given if _REQUEST_ID.fullmatch(given) else new_request_id()
        bind_request(request_id)
        route = self._route_of(scope["path"])
        traceparent = headers.get(tracing.TRACEPARENT_KEY, "")
        span = None if route in UNTRACED else tracing.begin_call(f"HTTP {route}", traceparent)
        started, status = time.monotonic(), 0

        async def named(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)[REQUEST_ID_KEY] = request_id
            await send(message)

        try:
            await self._app(scope, receive, named)
        except Exception:  # which has been answered, if it could be
            log.exception("http_request_failed", route=route)
        finally:
            seconds = time.monotonic() - started
            code = str(status or GONE_STATUS)
            metrics.HTTP_SECONDS.labels(route, code).observe(seconds)
            tracing.end_call(span, "OK" if 0 < status < 400 else code)
            if is_debugging():
                log.debug("http", route=route, status=code, seconds=round(seconds, 5))

    def _route_of(self, path: str) -> str:
        """The path of the route that a path belongs to, without what varies in it."""
        while path:
            if path in self._paths:
                return path
            path = path.rpartition("/")[0]
        return OTHER_ROUTE
