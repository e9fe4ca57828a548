"""The HTTP API as the page sees it, with a will of its own: answers that are slow, cut, refused, or swapped within."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from router_service.http.playground import page_routes

SLOTS = ("math", "strings", "format", "a-longer-name")
WORDS = (
    "The ",
    "sum ",
    "of ",
    "the ",
    "digits ",
    "is ",
    "43",
    ",\n",
    "which ",
    "every ",
    "expert ",
    "knows",
    ".",
    "",
)


@dataclass
class FakeApi:
    """What the fake does, and what it was asked.

    Attributes:
        pause_seconds: before each token.
        num_tokens: of an answer.
        cut_at: the connection of a first attempt breaks before this token.
        swap_at: math has another epoch from this token on.
        refusal: status and message of every answer.
        key: which must be shown.
        asked: bodies of the answers that were asked for.
        forgotten: sessions that the page has done with.
        resumed_from: `Last-Event-ID` of attempts that had one.
        num_left: answers that nobody read to the end.
    """

    pause_seconds: float = 0.02
    num_tokens: int = 40
    cut_at: int | None = None
    swap_at: int | None = None
    refusal: tuple[int, str] | None = None
    key: str | None = None
    has_chat_template: bool = True
    epoch: int = 1_763_824_000_000
    ready: bool = True
    asked: list[dict[str, Any]] = field(default_factory=list)
    forgotten: list[str] = field(default_factory=list)
    resumed_from: list[str] = field(default_factory=list)
    num_left: int = 0

    def app(self) -> Starlette:
        """The application."""
        routes = [
            *page_routes(),
            Route("/v1/models", self._models),
            Route("/fusionroute/state", self._state),
            Route("/fusionroute/sessions/{session_id}", self._forget, methods=["DELETE"]),
            Route("/v1/chat/completions", self._answer, methods=["POST"]),
            Route("/v1/completions", self._answer, methods=["POST"]),
        ]
        return Starlette(routes=routes)

    def token(self, index: int) -> dict[str, Any]:
        """A token whose expert changes every few tokens, and whose complement overrules every fifth one."""
        slot: str | None = SLOTS[(index // 3) % len(SLOTS)] if index % 11 != 10 else None
        text = WORDS[index % len(WORDS)]
        best, second = {"id": 7, "text": text, "logprob": -0.1}, {"id": 8, "text": " other", "logprob": -2.5}
        overruled = index % 5 == 4 and slot is not None
        third = {"id": 9, "text": "a rather long candidate", "logprob": -9.0}
        return {
            "index": index,
            "id": 7,
            "text": text,
            "logprob": -0.1,
            "expert": slot,
            "expert_epoch": self._epoch_of(slot, index),
            "degraded": index == 12,
            "weights": {name: 0.7 if name == slot else 0.1 for name in SLOTS},
            "top": {
                "fused": [best, second, third],
                "expert": [] if slot is None else [second, best] if overruled else [best, third],
                "complement": [best, second],
            },
        }

    def _epoch_of(self, slot: str | None, index: int) -> int:
        if slot is None:
            return 0
        return self.epoch + (
            5_000 if slot == "math" and self.swap_at is not None and index >= self.swap_at else 0
        )

    def _refuses(self, request: Request) -> Response | None:
        if self.key is not None and request.headers.get("authorization") != f"Bearer {self.key}":
            return JSONResponse({"error": {"message": "a key is needed"}}, 401)
        return None

    async def _models(self, request: Request) -> Response:
        offer = {
            "slots": SLOTS,
            "rules": ["sum", "mixture", "select", "route", "router"],
            "default_rule": "sum",
            "has_chat_template": self.has_chat_template,
            "max_context_tokens": 2048,
            "checkpoint": "0123456789abcdef",
        }
        return self._refuses(request) or JSONResponse({"data": [{"id": "fusionroute", "fusionroute": offer}]})

    async def _state(self, request: Request) -> Response:
        load = {"num_sessions": 2, "queue_depth": 0, "kv_tokens_used": 10, "kv_tokens_limit": 100}
        slots = [
            {
                "slot": slot,
                "ready": self.ready or slot != "math",
                "draining": 0,
                "standby": 0,
                "epoch": self.epoch,
                "address": "127.0.0.1:1",
                "model": f"models/{slot}",
                "load": load,
            }
            for slot in SLOTS
        ]
        state = {
            "slots": slots,
            "router": {"num_running_turns": 0, "load": load},
            "checkpoint": "0123456789abcdef",
            "checkpoint_id": "",
            "promotion": {"revision": 0, "error": ""},
        }
        return self._refuses(request) or JSONResponse(state)

    async def _forget(self, request: Request) -> Response:
        self.forgotten.append(request.path_params["session_id"])
        return JSONResponse({"existed": True})

    async def _answer(self, request: Request) -> Response:
        if refused := self._refuses(request):
            return refused
        body = await request.json()
        self.asked.append(body)
        if self.refusal is not None:
            status, message = self.refusal
            return JSONResponse({"error": {"message": message}}, status, {"retry-after": "3"})
        first = 0
        if last_id := request.headers.get("last-event-id"):
            self.resumed_from.append(last_id)
            first = int(last_id.rpartition(":")[2])
        is_chat = request.url.path.endswith("chat/completions")
        return StreamingResponse(self._events(body, first, is_chat), media_type="text/event-stream")

    async def _events(self, body: dict[str, Any], first: int, is_chat: bool) -> AsyncIterator[str]:
        num_tokens = min(self.num_tokens, body["max_tokens"])
        is_done = False
        try:
            for index in range(first, num_tokens):
                if self.pause_seconds:
                    await asyncio.sleep(self.pause_seconds)
                if self.cut_at == index and not self.resumed_from:
                    is_done = True
                    return
                token, reason = self.token(index), "length" if index == num_tokens - 1 else None
                extension: dict[str, Any] = {"tokens": [token]}
                if reason:
                    drafting = [{"drafter": "router", "num_drafted_tokens": 9, "num_accepted_tokens": 6}]
                    extension["statistics"] = {"drafting": drafting}
                text = {"delta": {"content": token["text"]}} if is_chat else {"text": token["text"]}
                choice = {"index": 0, "finish_reason": reason, "fusionroute": extension} | text
                yield f"id: s:{index + 1}\ndata: {json.dumps({'choices': [choice]})}\n\n"
            yield "data: [DONE]\n\n"
            is_done = True
        finally:
            self.num_left += not is_done
