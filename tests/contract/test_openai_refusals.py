"""OpenAI's API: what is refused has a status, and an error that names the field."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio

from tests.http_calls import Api, openai_stack
from tests.served_stack import Stack
from tests.tiny_models import MAX_CONTEXT

pytestmark = pytest.mark.asyncio(loop_scope="module")
TEXT, CHAT = "/v1/completions", "/v1/chat/completions"
PROMPT = "w5 w9 w20"
MESSAGES = [{"role": "user", "content": "w5 w9"}]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def stack(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Stack]:
    async with openai_stack(tmp_path_factory.mktemp("family")) as stack:
        yield stack


@pytest.mark.parametrize(
    ("path", "fields", "status", "param", "code"),
    [
        (TEXT, {}, 400, "prompt", "invalid_field"),
        (TEXT, {"prompt": PROMPT, "model": "gpt"}, 404, "model", "model_not_found"),
        (TEXT, {"prompt": 5}, 400, "prompt", "invalid_field"),
        (TEXT, {"prompt": []}, 400, "prompt", "invalid_field"),
        (TEXT, {"prompt": ""}, 400, "prompt", "empty_prompt"),
        (TEXT, {"prompt": ["w5", 5]}, 400, "prompt", "invalid_field"),
        (TEXT, {"prompt": [61]}, 400, "prompt", "token_out_of_range"),
        (TEXT, {"prompt": [-1]}, 400, "prompt", "invalid_field"),
        (TEXT, {"prompt": "w5 " * MAX_CONTEXT}, 400, "prompt", "context_length_exceeded"),
        (TEXT, {"prompt": [5] * MAX_CONTEXT}, 400, "prompt", "context_length_exceeded"),
        (TEXT, {"prompt": PROMPT, "suffix": "x"}, 400, "suffix", "invalid_field"),
        (TEXT, {"prompt": PROMPT, "best_of": 2}, 400, "best_of", "invalid_field"),
        (TEXT, {"prompt": PROMPT, "max_tokens": 0}, 400, "max_tokens", "invalid_field"),
        (TEXT, {"prompt": PROMPT, "max_tokens": "5"}, 400, "max_tokens", "invalid_field"),
        (TEXT, {"prompt": PROMPT, "temperature": 2.5}, 400, "temperature", "invalid_field"),
        (TEXT, {"prompt": PROMPT, "n": 0}, 400, "n", "invalid_field"),
        (TEXT, {"prompt": [PROMPT] * 3, "n": 100}, 400, "n", "invalid_field"),
        (TEXT, {"prompt": PROMPT, "logprobs": 21}, 400, "logprobs", "invalid_field"),
        (TEXT, {"prompt": PROMPT, "logit_bias": {"x": 1}}, 400, "logit_bias", "invalid_field"),
        (TEXT, {"prompt": PROMPT, "stop": [""]}, 400, "stop", "invalid_field"),
        (TEXT, {"prompt": PROMPT, "fusionroute": {"x": 1}}, 400, "fusionroute.x", "invalid_field"),
        (TEXT, {"prompt": PROMPT, "fusionroute": {"expert": "x"}}, 400, "fusionroute.expert", "unknown_slot"),
        (CHAT, {"messages": []}, 400, "messages", "invalid_field"),
        (CHAT, {"messages": [{"role": "bot", "content": "x"}]}, 400, "messages[0].role", "invalid_field"),
        (CHAT, {"messages": [{"role": "user", "content": 5}]}, 400, "messages[0].content", "invalid_field"),
        (CHAT, {"messages": [{"role": "user", "content": "w5 " * MAX_CONTEXT}]}, 400, "messages",
         "context_length_exceeded"),
        (CHAT, {"messages": MESSAGES, "top_logprobs": 2}, 400, "top_logprobs", "invalid_field"),
        (CHAT, {"messages": MESSAGES, "tools": [{"type": "function", "function": {"name": "f"}}]}, 400, "tools",
         "invalid_field"),
        (CHAT, {"messages": MESSAGES, "tool_choice": "required"}, 400, "tool_choice", "invalid_field"),
        (CHAT, {"messages": MESSAGES, "response_format": {"type": "x"}}, 400, "response_format.type",
         "invalid_field"),
        (CHAT, {"messages": MESSAGES, "chat_template_kwargs": {"messages": []}}, 400, "chat_template_kwargs",
         "invalid_field"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("stream", [False, True])
async def test_refusals_have_a_status_and_name_the_field(
    api: Api, path: str, fields: dict[str, Any], status: int, param: str, code: str, stream: bool
) -> None:
    response = await api.post(path, {"model": "fusionroute", "stream": stream, **fields})
    error = response.json()["error"]
    assert (response.status_code, error["param"], error["code"]) == (status, param, code), error
    assert error["type"] == ("not_found_error" if status == 404 else "invalid_request_error")
    assert error["message"]


async def test_an_image_is_refused_by_its_type(api: Api) -> None:
    parts = [{"type": "image_url", "image_url": {"url": "x"}}]
    response = await api.post(
        CHAT, {"model": "fusionroute", "messages": [{"role": "user", "content": parts}]}
    )
    assert response.status_code == 400
    assert "image_url" in response.json()["error"]["message"]


async def test_what_is_unknown_is_ignored(api: Api) -> None:
    unknown = {"user": "me", "metadata": {"a": "b"}, "store": True, "reasoning_effort": "low"}
    await api.whole(CHAT, messages=MESSAGES, max_completion_tokens=1, **unknown)


async def test_a_body_that_is_no_json_is_refused(api: Api) -> None:
    for content in (
        b"",
        b"{",
        b"[]",
        b"nul",
        b'{"model": "\xff"}',
        b'{"model": "fusionroute", "prompt": NaN}',
    ):
        response = await api.http.post(TEXT, content=content)
        assert (response.status_code, response.json()["error"]["type"]) == (400, "invalid_request_error")


async def test_a_busy_router_says_when_to_come_again(stack: Stack, api: Api) -> None:
    await stack.stop_expert("math")
    waiting = asyncio.create_task(api.post(TEXT, {"model": "fusionroute/math", "prompt": PROMPT, "n": 6}))
    async with asyncio.timeout(10):
        while stack.router.keeper.num_running < 6:
            await asyncio.sleep(0.01)
    response = await api.post(TEXT, {"model": "fusionroute", "prompt": PROMPT, "stream": True})
    assert (response.status_code, response.json()["error"]["type"]) == (429, "rate_limit_error")
    assert int(response.headers["retry-after"]) >= 1
    waiting.cancel()
    async with asyncio.timeout(10):
        while stack.router.keeper.num_running:
            await asyncio.sleep(0.01)
    gone = await api.post(
        TEXT,
        {
            "model": "fusionroute/math",
            "prompt": PROMPT,
            "stream": True,
            "fusionroute": {"on_expert_unavailable": "fail"},
        },
    )
    assert (gone.status_code, gone.json()["error"]["code"]) == (503, "expert_unavailable")
    await stack.start_expert("math")


async def test_json_is_demanded_by_a_constraint_or_refused(api: Api) -> None:
    """These models have no token to write JSON with."""
    for wanted in (
        {"type": "json_object"},
        {"type": "json_schema", "json_schema": {"name": "x", "schema": {}}},
    ):
        body = {"model": "fusionroute", "messages": MESSAGES, "response_format": wanted}
        response = await api.post(CHAT, body)
        assert (response.status_code, json.loads(response.text)["error"]["param"]) == (400, "response_format")


async def test_a_prompt_that_is_too_long_is_told_in_the_words_that_clients_look_for(api: Api) -> None:
    for path, fields in (
        (TEXT, {"prompt": "w5 " * 200}),
        (CHAT, {"messages": [{"role": "user", "content": "w5 " * 200}]}),
    ):
        answer = await api.post(path, {"model": "fusionroute", **fields})
        assert (
            f"this model's maximum context length is {MAX_CONTEXT} tokens"
            in answer.json()["error"]["message"]
        )
