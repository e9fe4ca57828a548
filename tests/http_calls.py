"""Calls of a router's HTTP port as tests make them."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2

from tests.served_stack import Stack, make_family, served

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ 'w3 ' if message.role == 'assistant' else 'w2 ' }}{{ message.content }} "
    "{% endfor %}"
    "{% if add_generation_prompt %}w4{% endif %}"
)
"""For the tests' tokenizer of numbered words."""


@dataclass(frozen=True)
class Chunk:
    """One event of a stream."""

    event_id: str
    data: dict[str, Any]

    @property
    def choice(self) -> dict[str, Any]:
        """The only one."""
        (choice,) = self.data["choices"]
        found: dict[str, Any] = choice
        return found


@dataclass(frozen=True)
class Api:
    """OpenAI's API of a router."""

    http: httpx2.AsyncClient

    @classmethod
    @asynccontextmanager
    async def of(cls, stack: Stack) -> AsyncIterator[Api]:
        """That of a stack with an HTTP port."""
        assert stack.router.http_url is not None
        async with httpx2.AsyncClient(base_url=stack.router.http_url, timeout=30) as client:
            yield cls(client)

    async def post(self, path: str, body: Any, **headers: str) -> httpx2.Response:
        """Whatever comes back."""
        return await self.http.post(
            path, json=body, headers={k.replace("_", "-"): v for k, v in headers.items()}
        )

    async def whole(self, path: str, **fields: Any) -> dict[str, Any]:
        """The body of a good answer."""
        response = await self.post(path, {"model": "fusionroute", **fields})
        assert response.status_code == 200, response.text
        found: dict[str, Any] = response.json()
        return found

    async def streamed(self, path: str, headers: dict[str, str] | None = None, **fields: Any) -> list[Chunk]:
        """The chunks of a stream that ends well; checks its form."""
        body = {"model": "fusionroute", "stream": True, **fields}
        response = await self.http.post(path, json=body, headers=headers)
        assert response.status_code == 200, response.text
        assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
        assert response.text.endswith("data: [DONE]\n\n")
        return [read_event(each) for each in response.text.split("\n\n")[:-2]]


@asynccontextmanager
async def openai_stack(folder: Path) -> AsyncIterator[Stack]:
    """A stack whose models have a chat template, with an HTTP port and room for six turns."""
    family = make_family(folder)
    (family.router / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    async with served(family, http_port=0, max_running_turns=6) as stack:
        yield stack


def read_event(text: str) -> Chunk:
    """One event as it stands on the wire."""
    lines = text.split("\n")
    event_id = lines[0].removeprefix("id: ") if lines[0].startswith("id: ") else ""
    assert len(lines) == 1 + bool(event_id) and lines[-1].startswith("data: "), lines
    return Chunk(event_id, json.loads(lines[-1].removeprefix("data: ")))
