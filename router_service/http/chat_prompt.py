"""Conversations as token ids: by the chat template of the checkpoint's tokenizer."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedTokenizerBase

from fusionroute.errors import InvalidRequest, Reason, invalid
from fusionroute.vocabulary import first_line
from router_service.http.openai_prompts import encodable, text_of
from router_service.http.openai_requests import ChatMessage, ToolCall
from router_service.http.service import RouterApi
from router_service.request_limits import CHARACTERS_PER_TOKEN

RESERVED_VARIABLES = frozenset(
    {"conversation", "messages", "tools", "documents", "chat_template", "add_generation_prompt"}
    | {"continue_final_message", "tokenize", "padding", "truncation", "max_length", "return_tensors"}
    | {"return_dict", "return_assistant_tokens_mask", "tokenizer_kwargs", "bos_token", "eos_token"}
)
"""That a request may not set: they are how we call the template, not what it asks for."""


@dataclass(frozen=True, slots=True)
class Conversation:
    """What is put before the chat template.

    Attributes:
        messages: as they came.
        adds_generation_prompt: whether what begins an answer comes last.
        continues: the last message, the assistant's, is not complete.
        variables: further ones of the template.
        tools: that the model is told of.
    """

    messages: Sequence[ChatMessage]
    adds_generation_prompt: bool = True
    continues: bool = False
    variables: Mapping[str, Any] = field(default_factory=dict)
    tools: Sequence[Mapping[str, Any]] = ()


async def conversation_ids(conversation: Conversation, api: RouterApi) -> list[int]:
    """The ids of a conversation up to where the answer begins.

    Raises:
        InvalidRequest: naming the message that cannot be read, or what the template has to say; CONTEXT_FULL where
            the conversation is longer than the context.
    """
    if api.tokenizer.chat_template is None:
        limit = "the checkpoint's tokenizer has no chat template; use /v1/completions"
        raise invalid("messages", f"{len(conversation.messages)} messages", limit)
    if refused := sorted(RESERVED_VARIABLES & conversation.variables.keys()):
        raise invalid(
            "chat_template_kwargs", refused[0], "a variable of the template that is not set otherwise"
        )
    messages = [_as_template_wants(number, message) for number, message in enumerate(conversation.messages)]
    _check_length(messages, api.offer.max_context_tokens)
    ids = await asyncio.to_thread(_rendered, conversation, messages, api.tokenizer)
    if not ids:
        raise InvalidRequest(
            Reason.EMPTY_PROMPT,
            "the messages have no tokens: write something",
            metadata={"field": "messages"},
        )
    limit = str(api.offer.max_context_tokens - 1)
    if len(ids) >= api.offer.max_context_tokens:
        raise InvalidRequest(
            Reason.CONTEXT_FULL,
            f"the messages have {len(ids)} tokens; the longest prompt is {limit} tokens",
            metadata={"field": "messages", "limit": limit},
        )
    return ids


def _rendered(
    conversation: Conversation, messages: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase
) -> list[int]:
    if conversation.continues and messages[-1]["role"] != "assistant":
        raise invalid("continue_final_message", True, "only where the last message is the assistant's")
    try:
        text = tokenizer.apply_chat_template(
            messages,
            tools=list(conversation.tools) or None,
            add_generation_prompt=conversation.adds_generation_prompt and not conversation.continues,
            continue_final_message=conversation.continues,
            tokenize=False,
            **conversation.variables,
        )
    except Exception as error:  # a template may raise anything
        limit = f"the chat template refuses them: {first_line(error)}"
        raise invalid("messages", f"{len(messages)} messages", limit) from error
    ids: list[int] = tokenizer(str(text), add_special_tokens=False, verbose=False)["input_ids"]
    return ids


def _as_template_wants(number: int, message: ChatMessage) -> dict[str, Any]:
    """A message as chat templates take it: `developer` is what they know as `system`."""
    place = f"messages[{number}]"
    role = "system" if message.role == "developer" else message.role
    told: dict[str, Any] = {"role": role}
    if message.tool_calls:
        told["tool_calls"] = [
            _call(f"{place}.tool_calls[{index}]", call) for index, call in enumerate(message.tool_calls)
        ]
        told["content"] = (
            encodable(f"{place}.content", text_of(message, f"{place}.content")) if message.content else ""
        )
    else:
        told["content"] = encodable(f"{place}.content", text_of(message, f"{place}.content"))
    if message.name is not None:
        told["name"] = encodable(f"{place}.name", message.name)
    if message.tool_call_id is not None:
        told["tool_call_id"] = encodable(f"{place}.tool_call_id", message.tool_call_id)
    return told


def _call(field: str, call: ToolCall) -> dict[str, Any]:
    """An earlier call; templates take its arguments as an object."""
    try:
        arguments = json.loads(call.function.arguments or "{}")
    except ValueError:
        raise invalid(f"{field}.function.arguments", call.function.arguments, "JSON in a string") from None
    return {
        "id": call.id,
        "type": "function",
        "function": {"name": call.function.name, "arguments": arguments},
    }


def _check_length(conversation: list[dict[str, Any]], max_context_tokens: int) -> None:
    num_characters = sum(len(message["content"]) for message in conversation)
    most = CHARACTERS_PER_TOKEN * max_context_tokens
    if num_characters > most:
        limit = f"at most {most} characters, {CHARACTERS_PER_TOKEN} for each of {max_context_tokens} tokens of context"
        raise InvalidRequest(
            Reason.CONTEXT_FULL,
            f"messages have {num_characters} characters; {limit}",
            metadata={"field": "messages", "limit": limit},
        )
