"""OpenAI's API: /v1/models, /v1/completions and /v1/chat/completions."""

from __future__ import annotations

import re
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any
from uuid import uuid4

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route

from fusionroute.errors import FusionRouteError, invalid
from fusionroute.v1 import router_pb2
from router_service.http.errors import openai_error, openai_error_body
from router_service.http.openai_answers import ChatChoice, Choice, Scored, TextChoice
from router_service.http.openai_models import models_route
from router_service.http.openai_prompts import prompts_of, set_conversation, set_prompt
from router_service.http.openai_requests import (
    ChatBody,
    CompletionBody,
    Extension,
    Sampled,
    one_of,
    read_body,
)
from router_service.http.openai_turns import numbered, turn_request
from router_service.http.presence import unless_gone
from router_service.http.service import RouterApi
from router_service.http.sse import DONE, KEEP_ALIVE, KEEP_ALIVE_SECONDS, EventStream, event
from router_service.http.token_details import Details
from router_service.http.token_text import TokenText
from router_service.http.turns import begun, events_of_all
from router_service.live_turn import LiveTurn

DEFAULT_COMPLETION_TOKENS = 16
_EVENT_ID = re.compile(r"([A-Za-z0-9._:-]{1,128}):(\d{1,9})")


@dataclass(slots=True)
class Answer:
    """What a request gets: one body, or chunks.

    Attributes:
        requests: of the turns that write it.
        make: a choice, of its number and turn.
        kind: `object` of the body; that of chunks where these have another one.
    """

    api: RouterApi
    body: Sampled
    requests: list[router_pb2.GenerateRequest]
    num_choices: int
    make: Callable[[int, LiveTurn], Choice]
    prefix: str
    kind: str
    chunk_kind: str
    resumes: tuple[str, int] | None = None
    created: int = field(default_factory=lambda: int(time.time()))
    _num_prompt: int = 0
    _num_generated: int = 0

    async def whole(self) -> dict[str, Any]:
        """All choices. Raises FusionRouteError."""
        async with begun(self.api, self.requests) as lives:
            choices = [self.make(index, live) for index, live in enumerate(lives)]
            async with aclosing(events_of_all(self.api, lives, KEEP_ALIVE_SECONDS)) as batches:
                async for batch in batches:
                    for each in batch:
                        self._note(each.index, each.event)
                        _tell(choices[each.index], each.event)
            head = self._head(lives, self.kind)
            return {**head, "choices": [choice.whole() for choice in choices], "usage": self._usage()}

    async def parts(self) -> AsyncGenerator[bytes, None]:
        """Chunks as events. Raises FusionRouteError."""
        async with begun(self.api, self.requests) as lives:
            from_token = 0
            if self.resumes is not None:
                session_id, from_token = self.resumes
                lives = [await self.api.resume(session_id, from_token)]
            choices = [self.make(index, live) for index, live in enumerate(lives)]
            head = self._head(lives, self.chunk_kind)
            has_usage = bool(self.body.stream_options and self.body.stream_options.include_usage)
            tail = {"usage": None} if has_usage else {}
            async with aclosing(events_of_all(self.api, lives, KEEP_ALIVE_SECONDS, from_token)) as batches:
                async for batch in batches:
                    written = []
                    for each in batch:
                        self._note(each.index, each.event)
                        if from_token and each.event.HasField("started"):
                            continue
                        event_id = self._event_id(lives, each.event)
                        for chunk in _tell(choices[each.index], each.event):
                            written.append(event({**head, "choices": [chunk], **tail}, event_id))
                    if written or not batch:
                        yield b"".join(written) or KEEP_ALIVE
            last = event({**head, "choices": [], "usage": self._usage()}) if has_usage else b""
            yield last + DONE

    def _head(self, lives: list[LiveTurn], kind: str) -> dict[str, Any]:
        name = lives[0].session_id if len(lives) == 1 else uuid4().hex
        return {
            "id": f"{self.prefix}-{name}",
            "object": kind,
            "created": self.created,
            "model": self.body.model,
            "system_fingerprint": lives[0].turn.checkpoint,
        }

    def _event_id(self, lives: list[LiveTurn], happened: router_pb2.GenerationEvent) -> str:
        if len(lives) > 1 or not happened.HasField("token"):
            return ""
        return f"{lives[0].session_id}:{happened.token.index + 1}"

    def _note(self, index: int, happened: router_pb2.GenerationEvent) -> None:
        if happened.HasField("finished"):
            if index % self.num_choices == 0:
                self._num_prompt += happened.finished.num_prompt_tokens
            self._num_generated += happened.finished.num_generated_tokens

    def _usage(self) -> dict[str, int]:
        return {
            "prompt_tokens": self._num_prompt,
            "completion_tokens": self._num_generated,
            "total_tokens": self._num_prompt + self._num_generated,
        }


def _tell(choice: Choice, happened: router_pb2.GenerationEvent) -> list[dict[str, Any]]:
    match happened.WhichOneof("event"):
        case "started":
            return choice.begin(happened.started)
        case "token":
            chunk = choice.add(happened.token)
            return [] if chunk is None else [chunk]
        case _:
            return [choice.end(happened.finished)]


def openai_routes(api: RouterApi) -> list[BaseRoute]:
    """The routes under /v1."""

    async def completions(request: Request) -> Response:
        body = read_body(CompletionBody, await request.body())
        return await answer(request, body, await _completion(body, api))

    async def chat(request: Request) -> Response:
        body = read_body(ChatBody, await request.body())
        return await answer(request, body, await _chat(body, api))

    async def answer(request: Request, body: Sampled, wanted: Answer) -> Response:
        if body.stream:
            wanted.resumes = _resumed(request, wanted)
            if wanted.resumes is not None:
                wanted.requests = []
            return EventStream(wanted.parts(), openai_error, _late_error)
        async with unless_gone(request.receive):
            return JSONResponse(await wanted.whole())

    return [
        *models_route(api),
        Route("/v1/completions", completions, methods=["POST"]),
        Route("/v1/chat/completions", chat, methods=["POST"]),
    ]


def _late_error(error: FusionRouteError) -> bytes:
    return event(openai_error_body(error))


def _resumed(request: Request, wanted: Answer) -> tuple[str, int] | None:
    """Where a stream that broke is to go on: session and token."""
    shown = request.headers.get("last-event-id")
    if not shown:
        return None
    found = _EVENT_ID.fullmatch(shown)
    if found is None or len(wanted.requests) != 1:
        raise invalid("last-event-id", shown, "the id of an event of a stream with one choice")
    return found[1], int(found[2])


async def _completion(body: CompletionBody, api: RouterApi) -> Answer:
    if body.suffix:
        raise invalid("suffix", body.suffix, "not supported: these models write at the end of a text only")
    if body.best_of is not None and body.best_of != (body.n or 1):
        raise invalid("best_of", body.best_of, "the same as n: answers are not ranked here")
    if body.echo:
        raise invalid("echo", body.echo, "not supported")
    max_tokens = one_of(body.max_tokens, DEFAULT_COMPLETION_TOKENS)
    if max_tokens < 1:
        raise invalid("max_tokens", max_tokens, "1 or more")
    num_top = max(1, body.logprobs) if body.logprobs is not None else 0
    prompted = []
    for prompt in prompts_of(body.prompt):
        request = turn_request(body, api, max_tokens, num_top)
        set_prompt(request, prompt)
        prompted.append(request)
    text = TokenText(api.tokenizer)

    def make(index: int, live: LiveTurn) -> Choice:
        return TextChoice(index, Scored(body.logprobs, text), _details(body, live))

    requests = numbered(prompted, body.n or 1, body.seed)
    return Answer(api, body, requests, body.n or 1, make, "cmpl", "text_completion", "text_completion")


async def _chat(body: ChatBody, api: RouterApi) -> Answer:
    if body.top_logprobs is not None and not body.logprobs:
        raise invalid("top_logprobs", body.top_logprobs, "only together with logprobs")
    if body.max_tokens == 0:
        raise invalid("max_tokens", 0, "1 or more")
    max_tokens = one_of(body.max_completion_tokens, body.max_tokens, api.max_new_tokens)
    request = turn_request(body, api, max_tokens, max(1, body.top_logprobs or 0) if body.logprobs else 0)
    await set_conversation(request, body.messages, api)
    text = TokenText(api.tokenizer)
    num_top = (body.top_logprobs or 0) if body.logprobs else None

    def make(index: int, live: LiveTurn) -> Choice:
        return ChatChoice(index, Scored(num_top, text), _details(body, live))

    requests = numbered([request], body.n or 1, body.seed)
    return Answer(
        api, body, requests, body.n or 1, make, "chatcmpl", "chat.completion", "chat.completion.chunk"
    )


def _details(body: Sampled, live: LiveTurn) -> Details | None:
    extension = body.fusionroute or Extension()
    return Details(live, extension.num_candidates or 0) if extension.details else None
