"""All HTTP routes of the router in one application."""

from __future__ import annotations

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route

from fusionroute import __version__
from router_service.http.service import RouterApi


def application(api: RouterApi) -> Starlette:
    """The application for `fusionroute.http_server.serving_http`."""
    routed = Starlette(routes=[*upkeep_routes(api)])
    routed.router.redirect_slashes = False  # to the host that the caller named
    return routed


def upkeep_routes(api: RouterApi) -> list[BaseRoute]:
    """Whether the router is there, and which version it is."""

    async def health(request: Request) -> Response:
        return JSONResponse({"status": "ok"})

    async def ready(request: Request) -> Response:
        reasons = await api.health.why_not_ready()
        return JSONResponse({"ready": not reasons, "reasons": reasons}, 503 if reasons else 200)

    async def version(request: Request) -> Response:
        return JSONResponse({"version": __version__, "checkpoint": api.offer.checkpoint})

    return [Route("/health", health), Route("/ready", ready), Route("/version", version)]
