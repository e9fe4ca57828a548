"""Requests to a router and what came of them, for tests."""

from __future__ import annotations

from contextlib import aclosing
from typing import Any

import pytest

from fusionroute.errors import FusionRouteError, Reason
from fusionroute.v1.router_pb2 import GenerateRequest, SamplingParameters
from tests.served_stack import Stack

PROMPT = [5, 9, 11, 3]


def ask(max_tokens: int = 8, prompt: list[int] | None = None, **changes: Any) -> GenerateRequest:
    sampling = {"max_tokens": max_tokens, "ignore_eos": True} | changes.pop("sampling", {})
    tokens = {"ids": prompt or PROMPT}
    return GenerateRequest(token_ids=tokens, sampling=SamplingParameters(**sampling), **changes)


async def reason_of(stack: Stack, request: GenerateRequest) -> tuple[Reason, str]:
    with pytest.raises(FusionRouteError) as caught:
        await stack.answer(request)
    return caught.value.reason, caught.value.message


async def first_token(stack: Stack, request: GenerateRequest) -> str:
    """Starts a turn, reads one token and leaves. Returns the session id."""
    session_id = ""
    async with aclosing(stack.client.generate(request)) as events:
        async for event in events:
            if event.WhichOneof("event") == "started":
                session_id = event.started.session_id
            if event.WhichOneof("event") == "token":
                break
    return session_id
