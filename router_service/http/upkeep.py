"""What operators and probes ask: whether the router is there, which version it is, what it has counted."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route

from fusionroute import __version__
from fusionroute.metrics import CONTENT_TYPE
from router_service.http.openapi import OPENAPI_PATH, text
from router_service.http.service import RouterApi


def upkeep_routes(api: RouterApi) -> list[BaseRoute]:
    """/health, /ready, /version, /metrics and /openapi.json."""

    async def health(request: Request) -> Response:
        return JSONResponse({"status": "ok"})

    async def ready(request: Request) -> Response:
        reasons = await api.health.why_not_ready()
        return JSONResponse({"ready": not reasons, "reasons": reasons}, 503 if reasons else 200)

    async def version(request: Request) -> Response:
        return JSONResponse({"version": __version__, "checkpoint": api.offer.checkpoint})

    async def metrics(request: Request) -> Response:
        return Response(api.exposition.text(), headers={"content-type": CONTENT_TYPE})

    described: list[bytes] = []

    async def openapi(request: Request) -> Response:
        if not described:
            described.append(text().encode())
        return Response(described[0], media_type="application/json")

    return [
        Route(OPENAPI_PATH, openapi),
        Route("/health", health),
        Route("/ready", ready),
        Route("/version", version),
        Route("/metrics", metrics),
    ]
