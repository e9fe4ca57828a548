"""How much a request may hold, checked before anything is made of it: tokenising a text costs in proportion to it."""

from __future__ import annotations

import re

from fusionroute.errors import InvalidRequest, Reason, invalid
from fusionroute.v1 import router_pb2

MAX_ID_CHARACTERS = 128
MAX_SLOT_CHARACTERS = 32
MAX_MESSAGES = 4096
ROLES = frozenset({"system", "user", "assistant"})
MAX_CONSTRAINT_CHARACTERS = {"json_schema": 65_536, "regex": 8_192, "grammar": 65_536}
CHARACTERS_PER_TOKEN = 64
"""A text with more characters than this for each token of the context is refused without counting its tokens. Usual
text has about four; only long runs of one character come near."""

_ID = re.compile(r"[A-Za-z0-9._:-]{0,128}")


def check_limits(request: router_pb2.GenerateRequest, max_context_tokens: int) -> None:
    """Raises InvalidRequest when an id, the prompt or its parts are longer than they can sensibly be.

    Args:
        request: as it came.
        max_context_tokens: longest session of the checkpoint that would serve it.
    """
    check_id("session_id", request.session_id)
    check_id("request_id", request.request_id)
    if len(request.fixed_expert) > MAX_SLOT_CHARACTERS:
        raise invalid("fixed_expert", request.fixed_expert, f"at most {MAX_SLOT_CHARACTERS} characters")
    _check_constraint(request.sampling.constraint)
    kind = request.WhichOneof("prompt")
    if kind == "token_ids":
        _check_num_ids(len(request.token_ids.ids), max_context_tokens)
    elif kind == "messages":
        _check_messages(request.messages, max_context_tokens)
    else:
        _check_characters("text", len(request.text), max_context_tokens)


def check_id(field: str, value: str) -> None:
    """Raises InvalidRequest when a value cannot be an id."""
    if not _ID.fullmatch(value):
        raise invalid(field, value, f"at most {MAX_ID_CHARACTERS} characters of A-Z a-z 0-9 . _ : -")


def _check_constraint(constraint: router_pb2.Constraint) -> None:
    kind = constraint.WhichOneof("language")
    if kind is None:
        return
    text: str = getattr(constraint, kind)
    most = MAX_CONSTRAINT_CHARACTERS[kind]
    if not 1 <= len(text) <= most:
        raise invalid(f"constraint.{kind}", text, f"1 to {most} characters")


def _check_num_ids(num_ids: int, max_context_tokens: int) -> None:
    if num_ids >= max_context_tokens:
        limit = max_context_tokens - 1
        raise InvalidRequest(
            Reason.CONTEXT_FULL,
            f"token_ids has {num_ids} ids; the longest prompt is {limit} tokens",
            metadata={"field": "token_ids", "limit": str(limit)},
        )


def _check_messages(messages: router_pb2.ChatMessages, max_context_tokens: int) -> None:
    if len(messages.messages) > MAX_MESSAGES:
        raise invalid("messages", f"{len(messages.messages)} messages", f"at most {MAX_MESSAGES}")
    for message in messages.messages:
        if message.role not in ROLES:
            raise invalid("messages.role", message.role, "system, user or assistant")
    num_characters = sum(len(message.content) for message in messages.messages)
    _check_characters("messages", num_characters, max_context_tokens)


def _check_characters(field: str, num_characters: int, max_context_tokens: int) -> None:
    most = CHARACTERS_PER_TOKEN * max_context_tokens
    if num_characters > most:
        limit = f"at most {most} characters, {CHARACTERS_PER_TOKEN} for each of {max_context_tokens} tokens of context"
        raise InvalidRequest(
            Reason.CONTEXT_FULL,
            f"{field} has {num_characters} characters; {limit}",
            metadata={"field": field, "limit": limit},
        )
