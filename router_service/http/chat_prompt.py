"""Conversations of OpenAI's API as token ids."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fusionroute.errors import InvalidRequest, Reason, invalid
from router_service.chat import render
from router_service.http.openai_requests import ChatMessage
from router_service.http.service import RouterApi

RESERVED_VARIABLES = frozenset(
    {"conversation", "messages", "tools", "documents", "chat_template", "add_generation_prompt"}
    | {"continue_final_message", "tokenize", "padding", "truncation", "max_length", "return_tensors"}
    | {"return_dict", "return_assistant_tokens_mask", "tokenizer_kwargs", "bos_token", "eos_token"}
)
"""That a request may not set: they are how the template is called, not what it asks for."""


@dataclass(frozen=True, slots=True)
class Conversation:
    """What is put before the chat template.

    Attributes:
        messages: as they came.
        tools: that the model is told of.
        adds_generation_prompt: whether what begins an answer comes last.
        continues: the last message, the assistant's, is not complete.
        variables: further ones of the template.
    """

    messages: Sequence[ChatMessage]
    tools: Sequence[Mapping[str, Any]] = ()
    adds_generation_prompt: bool = True
    continues: bool = False
    variables: Mapping[str, Any] = field(default_factory=dict)


async def conversation_ids(conversation: Conversation, api: RouterApi) -> list[int]:
    """The ids of a conversation up to where the answer begins.

    Raises:
        InvalidRequest: naming the message that cannot be read, or what the template has to say; CONTEXT_FULL where
            the conversation is longer than the context.
    """
    if refused := sorted(RESERVED_VARIABLES & conversation.variables.keys()):
        raise invalid(
            "chat_template_kwargs", refused[0], "a variable of the template that is not set otherwise"
        )
    if conversation.continues and conversation.messages[-1].role != "assistant":
        raise invalid("continue_final_message", True, "only where the last message is the assistant's")
    options = {
        **conversation.variables,
        "add_generation_prompt": conversation.adds_generation_prompt and not conversation.continues,
        "continue_final_message": conversation.continues,
    }
    ids = await render(
        api.tokenizer,
        [message.model_dump(exclude_none=True) for message in conversation.messages],
        conversation.tools,
        max_context_tokens=api.offer.max_context_tokens,
        options=options,
    )
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
