"""/v1/models: the fused model, each of its experts alone, and its router alone."""

from __future__ import annotations

import time
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route

from router_service.http.openai_turns import model_names, model_unknown
from router_service.http.service import RouterApi


def models_route(api: RouterApi) -> list[BaseRoute]:
    """The list, and each of its entries."""
    created = int(time.time())

    def entry(name: str) -> dict[str, Any]:
        offer = api.offer
        facts = {
            "slots": list(offer.slots),
            "rules": [rule.value for rule in offer.rules],
            "default_rule": offer.default_rule.value,
            "has_chat_template": api.tokenizer.chat_template is not None,
            "max_context_tokens": offer.max_context_tokens,
            "checkpoint": offer.checkpoint,
        }
        return {
            "id": name,
            "object": "model",
            "created": created,
            "owned_by": "fusionroute",
            "max_model_len": offer.max_context_tokens,
            "fusionroute": facts,
        }

    async def models(request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [entry(name) for name in model_names(api)]})

    async def model(request: Request) -> Response:
        name = request.path_params["name"]
        if name not in model_names(api):
            raise model_unknown(name, api)
        return JSONResponse(entry(name))

    return [Route("/v1/models", models), Route("/v1/models/{name:path}", model)]
