"""The checkpoint's tokenizer over HTTP, in the shapes of vLLM: /tokenize, /detokenize and /tokenizer_info."""

from __future__ import annotations

import asyncio
from typing import Any

from pydantic import Field
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route

from fusionroute.errors import InvalidRequest, Reason, invalid
from router_service.http.chat_prompt import Conversation, conversation_ids
from router_service.http.openai_requests import Body, ChatMessage, TokenId, read_body
from router_service.http.service import RouterApi
from router_service.request_limits import CHARACTERS_PER_TOKEN

MAX_TOKENS = 1_000_000


class TokenizeBody(Body):
    """POST /tokenize: a text, or a conversation."""

    model: str | None = None
    prompt: str | None = Field(default=None, description="The text; or `messages` instead.")
    messages: list[ChatMessage] | None = Field(default=None, min_length=1, max_length=4096)
    add_special_tokens: bool | None = Field(default=None, description="Absent = yes for a text.")
    add_generation_prompt: bool | None = Field(default=None, description="Absent = yes.")
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    return_token_strs: bool | None = Field(default=None, description="Whether tokens come as strings too.")


class DetokenizeBody(Body):
    """POST /detokenize."""

    model: str | None = None
    tokens: list[TokenId] = Field(max_length=MAX_TOKENS)


def tokenizer_routes(api: RouterApi) -> list[BaseRoute]:
    """Three routes."""

    async def tokenize(request: Request) -> Response:
        body = read_body(TokenizeBody, await request.body())
        ids = await _ids(body, api)
        strings = None
        if body.return_token_strs:
            strings = await asyncio.to_thread(api.tokenizer.convert_ids_to_tokens, ids)
        told = {
            "count": len(ids),
            "max_model_len": api.offer.max_context_tokens,
            "tokens": ids,
            "token_strs": strings,
        }
        return JSONResponse(told)

    async def detokenize(request: Request) -> Response:
        body = read_body(DetokenizeBody, await request.body())
        width = api.offer.logits_width
        if bad := next((each for each in body.tokens if each >= width), None):
            raise InvalidRequest(
                Reason.TOKEN_OUT_OF_RANGE,
                f"tokens contains {bad}; ids go from 0 to {width - 1}",
                metadata={"field": "tokens", "limit": str(width - 1)},
            )
        return JSONResponse({"prompt": await asyncio.to_thread(api.tokenizer.decode, body.tokens)})

    async def tokenizer_info(request: Request) -> Response:
        tokenizer = api.tokenizer
        told = {
            "tokenizer_class": type(tokenizer).__name__,
            "vocab_size": len(tokenizer),
            "model_max_length": api.offer.max_context_tokens,
            "bos_token": tokenizer.bos_token,
            "eos_token": tokenizer.eos_token,
            "pad_token": tokenizer.pad_token,
            "unk_token": tokenizer.unk_token,
            "chat_template": tokenizer.chat_template,
        }
        return JSONResponse(told)

    return [
        Route("/tokenize", tokenize, methods=["POST"]),
        Route("/detokenize", detokenize, methods=["POST"]),
        Route("/tokenizer_info", tokenizer_info),
    ]


async def _ids(body: TokenizeBody, api: RouterApi) -> list[int]:
    if (body.prompt is None) == (body.messages is None):
        raise invalid("prompt", body.prompt and body.prompt[:40], "either prompt or messages")
    if body.messages is not None:
        conversation = Conversation(
            body.messages,
            adds_generation_prompt=body.add_generation_prompt is not False,
            continues=bool(body.continue_final_message),
            variables=body.chat_template_kwargs or {},
        )
        return await conversation_ids(conversation, api)
    assert body.prompt is not None
    most = CHARACTERS_PER_TOKEN * api.offer.max_context_tokens
    if len(body.prompt) > most:
        raise invalid("prompt", f"{len(body.prompt)} characters", f"at most {most}")
    return await asyncio.to_thread(_encoded, api, body.prompt, body.add_special_tokens is not False)


def _encoded(api: RouterApi, text: str, adds_special_tokens: bool) -> list[int]:
    ids: list[int] = api.tokenizer(text, add_special_tokens=adds_special_tokens, verbose=False)["input_ids"]
    return ids
