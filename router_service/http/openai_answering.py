"""How a request to OpenAI's API is answered: its turns become choices, told in chunks or as a whole."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any
from uuid import uuid4

from fusionroute.v1 import router_pb2
from router_service.http.openai_answers import Choice
from router_service.http.openai_requests import Sampled
from router_service.http.service import RouterApi
from router_service.http.sse import DONE, KEEP_ALIVE, KEEP_ALIVE_SECONDS, event, event_of, to_json
from router_service.http.turns import Event, Resumed, Turns


@dataclass(frozen=True, slots=True)
class Shape:
    """How bodies of one kind of answer are called: the beginning of ids, `object` of a body and of a chunk."""

    id_prefix: str
    whole: str
    chunk: str


@dataclass(slots=True)
class Answer:
    """What a request gets.

    Attributes:
        requests: of the turns that write it, `num_choices` for each prompt; empty where nothing is written.
        choices: one for each turn, or for each prompt where nothing is written.
        unwritten: all chunks where nothing is written.
        num_prompt_tokens: of all prompts, where no turn will tell.
        resumed: where a stream that broke is to go on.
    """

    api: RouterApi
    body: Sampled
    shape: Shape
    requests: Sequence[router_pb2.GenerateRequest]
    choices: list[Choice]
    unwritten: Callable[[], list[dict[str, Any]]] = list
    num_prompt_tokens: int = 0
    resumed: Resumed | None = None
    created: int = field(default_factory=lambda: int(time.time()))
    _name: str = field(default_factory=lambda: uuid4().hex)
    _checkpoint: str = ""
    _num_generated: int = 0

    async def whole(self) -> dict[str, Any]:
        """All choices in one body. Raises FusionRouteError."""
        async with aclosing(self._told()) as batches:
            async for _ in batches:
                pass
        choices = [choice.whole() for choice in self.choices]
        return {**self._head(self.shape.whole), "choices": choices, "usage": self._usage()}

    async def parts(self) -> AsyncGenerator[bytes, None]:
        """Chunks as server-sent events. Raises FusionRouteError."""
        options = self.body.stream_options
        has_usage = bool(options and options.include_usage)
        before, behind = "", '],"usage":null}' if has_usage else "]}"
        async with aclosing(self._told()) as batches:
            async for batch in batches:
                if not batch:
                    yield KEEP_ALIVE
                    continue
                if not before:  # the same in every chunk of a stream: made once
                    before = to_json(self._head(self.shape.chunk))[:-1] + ',"choices":['
                yield b"".join(event_of(f"{before}{to_json(chunk)}{behind}", name) for chunk, name in batch)
        head = self._head(self.shape.chunk)
        last = event({**head, "choices": [], "usage": self._usage()}) if has_usage else b""
        yield last + DONE

    async def _told(self) -> AsyncGenerator[list[tuple[dict[str, Any], str]], None]:
        """Chunks with the ids of their events, whatever is ready at a time; an empty list after a silence."""
        if not self.requests:
            yield [(chunk, "") for chunk in self.unwritten()]
            return
        turns = Turns(self.api, self.requests, self.resumed)
        async with aclosing(turns.events(KEEP_ALIVE_SECONDS)) as batches:
            async for batch in batches:
                chunks = [(chunk, self._event_id(each)) for each in batch for chunk in self._tell(each)]
                if chunks or not batch:
                    yield chunks

    def _tell(self, each: Event) -> list[dict[str, Any]]:
        choice, happened = self.choices[each.index], each.event
        match happened.WhichOneof("event"):
            case "started":
                if len(self.choices) == 1:
                    self._name = each.live.session_id
                self._checkpoint = happened.started.checkpoint
                from_token = self.resumed.from_token if self.resumed is not None else 0
                return choice.begin(each.live, from_token)
            case "token":
                chunk = choice.add(happened.token)
                return [] if chunk is None else [chunk]
            case _:
                if each.index % (self.body.n or 1) == 0:  # a prompt counts once
                    self.num_prompt_tokens += happened.finished.num_prompt_tokens
                self._num_generated += happened.finished.num_generated_tokens
                return choice.end(happened.finished)

    def _event_id(self, each: Event) -> str:
        if len(self.choices) > 1 or not each.event.HasField("token"):
            return ""
        return f"{each.live.session_id}:{each.event.token.index + 1}"

    def _head(self, kind: str) -> dict[str, Any]:
        return {
            "id": f"{self.shape.id_prefix}-{self._name}",
            "object": kind,
            "created": self.created,
            "model": self.body.model,
            "system_fingerprint": self._checkpoint or self.api.offer.checkpoint,
        }

    def _usage(self) -> dict[str, int]:
        return {
            "prompt_tokens": self.num_prompt_tokens,
            "completion_tokens": self._num_generated,
            "total_tokens": self.num_prompt_tokens + self._num_generated,
        }
