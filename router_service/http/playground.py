"""The playground: one page and what it needs, and the live state of the experts that it shows."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route

from fusionroute.v1 import common_pb2
from fusionroute.wire import load_to_message
from router_service.http.service import RouterApi
from router_service.instance_choice import Standing
from router_service.instances import Instance
from router_service.request_limits import check_id

ASSETS = "/playground/"
PAGE_PATHS = ("/", ASSETS)
"""That are answered without a key: the page itself, which asks people for the key that its calls need."""
PAGE = "index.html"

_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}

# Everything from this server, no script or style but those in files of ours, and nobody puts it into a frame.
_HEADERS = {
    "content-security-policy": "default-src 'self'; base-uri 'none'; object-src 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-cache",  # a newer server shows its own page at once
}

_STATES = {
    Standing.READY: "ready",
    Standing.STANDBY: "standby",
    Standing.FINISHING: "draining",
    Standing.MIGRATING: "draining",
    Standing.VANISHED: "vanished",
}


@dataclass(frozen=True, slots=True)
class Asset:
    """A file of the page, in memory."""

    body: bytes
    headers: dict[str, str]

    def response(self, request: Request) -> Response:
        """The file, or that the browser has it already."""
        if request.headers.get("if-none-match") == self.headers["etag"]:
            return Response(status_code=304, headers=self.headers)
        return Response(self.body, headers=self.headers)


def playground_routes(api: RouterApi) -> list[BaseRoute]:
    """The page, `/fusionroute/state`, which it asks for each second, and a way to end and forget a session.

    A stream that goes on after a cut needs a session, which does not end with its connection.
    """

    async def state(request: Request) -> Response:
        return JSONResponse(state_of(api), headers={"cache-control": "no-store"})

    async def forget(request: Request) -> Response:
        session_id = request.path_params["session_id"]
        check_id("session_id", session_id)
        existed = await api.keeper.delete(session_id)
        await api.scorer.closer.forget(session_id)
        return JSONResponse({"session_id": session_id, "existed": existed})

    return [
        *page_routes(),
        Route("/fusionroute/state", state, methods=["GET"]),
        Route("/fusionroute/sessions/{session_id}", forget, methods=["DELETE"]),
    ]


def page_routes() -> list[BaseRoute]:
    """The page at `/` and its files under `/playground/`."""
    assets = read_assets()

    async def page(request: Request) -> Response:
        return assets[PAGE].response(request)

    async def asset(request: Request) -> Response:
        found = assets.get(request.path_params["name"])
        if found is None:
            raise HTTPException(404)
        return found.response(request)

    return [Route("/", page, methods=["GET"]), Route(ASSETS + "{name}", asset, methods=["GET"])]


def read_assets() -> dict[str, Asset]:
    """The page's files by name; there are no others to ask for."""
    folder = files(__package__) / "static"
    return {each.name: _asset(each.name, each.read_bytes()) for each in folder.iterdir() if each.is_file()}


def _asset(name: str, body: bytes) -> Asset:
    kind = _TYPES["." + name.rpartition(".")[2]]
    etag = f'"{hashlib.sha256(body).hexdigest()[:32]}"'
    return Asset(body, {"content-type": kind, "etag": etag, **_HEADERS})


def state_of(api: RouterApi) -> dict[str, Any]:
    """Who serves which slot now, the router's own load, and the checkpoint, as JSON."""
    serving, promotion = api.served.current, api.served.promotion
    offer = serving.offer
    return {
        "slots": [_slot(api, slot) for slot in offer.slots],
        "router": {
            "model": serving.engine.facts.name,
            "num_running_turns": api.keeper.num_running,
            "load": _load(load_to_message(serving.engine.load())),
        },
        "checkpoint": offer.checkpoint,
        "checkpoint_id": serving.checkpoint_id,
        "num_retiring_checkpoints": len(api.served.retiring),
        "promotion": {"revision": promotion.revision, "error": promotion.error},
    }


def _slot(api: RouterApi, slot: str) -> dict[str, Any]:
    """A slot as new turns find it, and all its instances."""
    best = api.directory.best(slot)
    found = [each for each in api.directory.instances.values() if each.entry.slot == slot]
    instances = [_instance(each) for each in sorted(found, key=lambda each: each.entry.instance_id)]
    states = [each["state"] for each in instances]
    return {
        "slot": slot,
        "ready": best is not None and best.is_ready,
        "draining": states.count("draining"),
        "standby": states.count("standby"),
        "epoch": 0 if best is None else best.epoch,
        "address": "" if best is None else best.entry.address,
        "model": "" if best is None else best.entry.model.name,
        "load": None if best is None else _load(best.entry.load),
        "instances": instances,
    }


def _instance(instance: Instance) -> dict[str, Any]:
    return {
        "state": _STATES[instance.standing],
        "epoch": instance.epoch,
        "address": instance.entry.address,
        "model": instance.entry.model.name,
        "breaker": instance.breaker.state.value,
        "num_in_flight": instance.num_in_flight,
        "load": _load(instance.entry.load),
    }


def _load(load: common_pb2.Load) -> dict[str, int]:
    """As the contract names it; numbers, where protobuf's own JSON makes strings of the large ones."""
    return {each.name: int(getattr(load, each.name)) for each in common_pb2.Load.DESCRIPTOR.fields}
