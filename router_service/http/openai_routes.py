"""OpenAI's API: /v1/models, /v1/completions and /v1/chat/completions."""

from __future__ import annotations

import re

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route

from fusionroute.errors import FusionRouteError, invalid
from router_service.http.errors import openai_error, openai_error_body
from router_service.http.openai_answering import Answer
from router_service.http.openai_chat import chat
from router_service.http.openai_completions import completion
from router_service.http.openai_models import models_route
from router_service.http.openai_requests import ChatBody, CompletionBody, read_body
from router_service.http.presence import unless_gone
from router_service.http.service import RouterApi
from router_service.http.sse import EventStream, event
from router_service.http.token_text import TokenTexts
from router_service.http.turns import Resumed

_EVENT_ID = re.compile(r"([A-Za-z0-9._:-]{1,128}):(\d{1,9})")


def openai_routes(api: RouterApi) -> list[BaseRoute]:
    """The routes under /v1."""
    texts = TokenTexts()

    async def completions(request: Request) -> Response:
        body = read_body(CompletionBody, await request.body())
        async with unless_gone(request.receive):
            answer = await completion(body, api, texts.of(api.tokenizer))
            return await _answered(request, answer)

    async def chat_completions(request: Request) -> Response:
        body = read_body(ChatBody, await request.body())
        async with unless_gone(request.receive):
            answer = await chat(body, api, texts.of(api.tokenizer))
            return await _answered(request, answer)

    return [
        *models_route(api),
        Route("/v1/completions", completions, methods=["POST"]),
        Route("/v1/chat/completions", chat_completions, methods=["POST"]),
    ]


async def _answered(request: Request, answer: Answer) -> Response:
    if not answer.body.stream:
        return JSONResponse(await answer.whole())
    answer.resumed = _resumed(request, answer)
    return EventStream(answer.parts(), openai_error, _late_error)


def _late_error(error: FusionRouteError) -> bytes:
    return event(openai_error_body(error))


def _resumed(request: Request, answer: Answer) -> Resumed | None:
    """Where a stream that broke is to go on."""
    shown = request.headers.get("last-event-id")
    if not shown:
        return None
    found = _EVENT_ID.fullmatch(shown)
    if found is None or len(answer.requests) != 1:
        raise invalid("last-event-id", shown, "the id of an event of a stream with one choice")
    return Resumed(found[1], int(found[2]))
