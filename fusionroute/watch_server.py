"""The small HTTP server beside a daemon's gRPC: what probes and Prometheus ask, answered by the daemon's event loop.

    /livez       200 as long as anything is answered
    /progressz   200, or 503 while pending work does not move
    /readyz      200, or 503 with the reasons why no work should be sent here
    /metrics     Prometheus's text format

Where keys are configured, everything but /livez asks for one: `authorization: Bearer KEY`. Whoever connects and does
not send a request is hung up on (`fusionroute.watch_protocol`), so that probes are answered whatever others do.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import structlog

from fusionroute.grpc_runtime import check_port_free
from fusionroute.health import ServerHealth
from fusionroute.http_server import serving_http
from fusionroute.metrics import CONTENT_TYPE, Exposition, HealthCollector

if TYPE_CHECKING:
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import Response

    from fusionroute.settings import DaemonSettings

LIVE, PROGRESS, READY, METRICS = "/livez", "/progressz", "/readyz", "/metrics"
SCHEME = "bearer "
MOST_ANSWERS = 32
"""That are made at the same time, /livez apart; more wait."""

log = structlog.get_logger(__name__)


class Keys(Protocol):
    """Which keys are accepted: `fusionroute.api_keys.ApiKeys`."""

    def name_of(self, shown: bytes) -> str | None:
        """The name of a key; None when it is not accepted."""


async def _nothing_to_refresh() -> None:
    """All metrics are at hand."""


@dataclass(frozen=True, slots=True)
class Watched:
    """What the server tells of.

    Attributes:
        refresh: done before metrics are read, for what must be asked of others; what it raises is logged.
        keys: None = nobody is asked for one.
        request_seconds: how long a caller may take to send a request.
    """

    health: ServerHealth
    exposition: Exposition
    refresh: Callable[[], Awaitable[object]] = _nothing_to_refresh
    keys: Keys | None = None
    request_seconds: float = 10.0


def application(watched: Watched) -> Starlette:
    """The four routes."""
    from starlette.applications import Starlette
    from starlette.responses import JSONResponse, Response
    from starlette.routing import Route

    health = watched.health

    async def live(request: Request) -> Response:
        return JSONResponse({"live": True})

    async def progress(request: Request) -> Response:
        facts = {"progressing": health.is_progressing, "still_seconds": round(health.still_seconds, 3)}
        return JSONResponse(facts, 200 if health.is_progressing else 503)

    async def ready(request: Request) -> Response:
        reasons = await health.why_not_ready()
        return JSONResponse({"ready": not reasons, "reasons": reasons}, 503 if reasons else 200)

    async def metrics(request: Request) -> Response:
        try:
            await watched.refresh()
        except Exception:
            log.exception("metrics_refresh_failed")
        return Response(watched.exposition.text(), headers={"content-type": CONTENT_TYPE})

    places = asyncio.Semaphore(MOST_ANSWERS)  # /livez needs none: however busy the others are, it is answered

    def guarded(answer: Callable[[Request], Awaitable[Response]]) -> Callable[[Request], Awaitable[Response]]:
        async def answer_if_allowed(request: Request) -> Response:
            if watched.keys is None or _is_allowed(request.headers.getlist("authorization"), watched.keys):
                async with places:
                    return await answer(request)
            return JSONResponse(
                {"reason": "UNAUTHENTICATED", "message": "a key is needed: authorization: Bearer KEY"},
                401,
                {"www-authenticate": "Bearer"},
            )

        return answer_if_allowed

    routed = Starlette(
        routes=[
            Route(LIVE, live),
            Route(PROGRESS, guarded(progress)),
            Route(READY, guarded(ready)),
            Route(METRICS, guarded(metrics)),
        ]
    )
    routed.router.redirect_slashes = False  # to the host that the caller named
    return routed


def _is_allowed(shown: list[str], keys: Keys) -> bool:
    if len(shown) != 1 or shown[0][: len(SCHEME)].lower() != SCHEME:
        return False
    return keys.name_of(shown[0][len(SCHEME) :].strip().encode()) is not None


def check_watch_port_free(settings: DaemonSettings) -> None:
    """As `check_port_free`, for the watch port if there is one."""
    if settings.watch_port is not None:
        check_port_free(settings.watch_host, settings.watch_port)


@asynccontextmanager
async def watching(settings: DaemonSettings, watched: Watched) -> AsyncIterator[str | None]:
    """Serves within the context where settings name a watch port; gives HOST:PORT, or None.

    Raises:
        PortTaken: naming the address.
    """
    if settings.watch_port is None:
        yield None
        return
    from fusionroute.watch_protocol import patient_for

    watched.exposition.add(HealthCollector(watched.health))
    async with serving_http(
        application(watched),
        settings.watch_host,
        settings.watch_port,
        port_field="watch_port",
        http=patient_for(watched.request_seconds),
    ) as address:
        yield address
