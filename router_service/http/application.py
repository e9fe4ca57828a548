"""All HTTP routes of the router in one application, and what stands before them."""

from __future__ import annotations

from dataclasses import dataclass

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Match, Route
from starlette.types import ASGIApp

from fusionroute.api_keys import ApiKeys
from fusionroute.errors import FusionRouteError
from fusionroute.rpc_context import current_request
from router_service.http.access import KeysAsked
from router_service.http.body_limit import BodyLimit
from router_service.http.errors import openai_body, openai_error
from router_service.http.observing import GONE_STATUS, Observed
from router_service.http.openai_routes import openai_routes
from router_service.http.own_pages import OwnPages
from router_service.http.playground import PAGE_PATHS, playground_routes
from router_service.http.presence import ClientGone
from router_service.http.service import RouterApi
from router_service.http.tgi import tgi_routes
from router_service.http.tokenizer_routes import tokenizer_routes
from router_service.http.upkeep import upkeep_routes

OPEN_PATHS = ("/health", *PAGE_PATHS)
"""That are answered without a key."""


@dataclass(frozen=True, slots=True)
class Admittance:
    """Whose requests are answered.

    Attributes:
        keys: None = nobody is asked for one.
        max_body_bytes: of a request.
        origins: whose pages may call from browsers.
        is_local: whether only this machine reaches the port.
    """

    keys: ApiKeys | None = None
    max_body_bytes: int = 8 * 2**20
    origins: tuple[str, ...] = ()
    is_local: bool = True


def application(api: RouterApi, admittance: Admittance | None = None) -> ASGIApp:
    """The application for `fusionroute.http_server.serving_http`."""
    admittance = admittance or Admittance()
    routes = all_routes(api)
    routed = Starlette(
        routes=routes,
        exception_handlers={
            FusionRouteError: _refused,
            HTTPException: _not_there,
            ClientGone: _gone,
            Exception: _failed,
        },
    )
    routed.router.redirect_slashes = False  # to the host that the caller named
    app: ASGIApp = BodyLimit(routed, admittance.max_body_bytes)
    if admittance.keys is not None:
        app = KeysAsked(app, admittance.keys, OPEN_PATHS)
    else:
        app = OwnPages(app, admittance.origins, is_local=admittance.is_local)
    if admittance.origins:  # before the keys: browsers ask without one whether they may ask
        app = CORSMiddleware(
            app,
            allow_origins=admittance.origins,
            allow_methods=["GET", "POST", "DELETE"],
            allow_headers=["*"],
            expose_headers=["x-request-id", "retry-after"],
        )
    return Observed(app, routes)


def all_routes(api: RouterApi) -> list[BaseRoute]:
    """Of every API."""
    return [
        *upkeep_routes(api),
        *tokenizer_routes(api),
        *openai_routes(api),
        *tgi_routes(api),
        *playground_routes(api),
    ]


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, FusionRouteError)
    return openai_error(error)


async def _not_there(request: Request, error: Exception) -> Response:
    """404 and 405 with a body that says so."""
    assert isinstance(error, HTTPException)
    shown = f"{request.method} {request.url.path}"[:200]
    what = {404: f"there is no {shown}", 405: f"{shown}: this method is not known here"}
    code = {404: "not_found", 405: "method_not_allowed", 413: "request_too_large"}.get(error.status_code)
    body = openai_body(error.status_code, what.get(error.status_code, error.detail), code)
    headers = dict(error.headers or {})
    if error.status_code == 405:
        headers["Allow"] = ", ".join(sorted(_methods_at(request)))
    return JSONResponse(body, error.status_code, headers)


def _methods_at(request: Request) -> set[str]:
    """What a path takes: of all its routes, where the router looks at the first."""
    routes: list[BaseRoute] = request.app.routes
    found = [route for route in routes if route.matches(request.scope)[0] is not Match.NONE]
    return {method for route in found if isinstance(route, Route) for method in route.methods or ()}


async def _gone(request: Request, error: Exception) -> Response:
    """For the counts only: nobody reads it."""
    return Response(status_code=GONE_STATUS)


async def _failed(request: Request, error: Exception) -> Response:
    """What nobody has caught; `Observed` logs it."""
    return JSONResponse(
        openai_body(500, f"the router failed; its log says more under {current_request()}", "internal_error"),
        500,
    )
