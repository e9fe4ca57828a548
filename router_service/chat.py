"""Messages with tools as a prompt, by the tokenizer's chat template; what the template does not take is refused.

A template that knows nothing of tools drops them without a word. So a conversation with tools is rendered without
them too, and refused where that makes no difference.
"""

from __future__ import annotations

import asyncio
import copy
import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from fusionroute.errors import invalid
from router_service.request_limits import CHARACTERS_PER_TOKEN, MAX_MESSAGES
from router_service.tool_calls import MAX_TOOLS, is_tool_name

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message = Mapping[str, Any]
ROLES = frozenset({"system", "developer", "user", "assistant", "tool"})
MAX_SAID_CHARACTERS = 300


async def render(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    tools: Sequence[Mapping[str, Any]] = (),
    *,
    max_context_tokens: int,
    options: Mapping[str, Any] | None = None,
) -> list[int]:
    """The token ids of a conversation, up to where the assistant's next answer begins.

    Args:
        messages: as in a request to OpenAI's API: role, content (text, or a list of text parts), tool_calls,
            tool_call_id, name.
        tools: the same, `{"type": "function", "function": {...}}` each.
        max_context_tokens: longest session of the checkpoint.
        options: further variables for the template; also `add_generation_prompt` and `continue_final_message`.

    Raises:
        InvalidRequest: naming the field, and what the template does not take.
    """
    plain = plain_messages(messages, max_context_tokens)
    wanted = checked_tools(tools)
    return await asyncio.to_thread(_render, tokenizer, plain, wanted, dict(options or {}))


def plain_messages(messages: Sequence[Message], max_context_tokens: int) -> list[dict[str, Any]]:
    """Messages as templates take them: content as text, arguments of calls as objects.

    Raises:
        InvalidRequest: naming the field.
    """
    if not messages:
        raise invalid("messages", "[]", "at least one")
    if len(messages) > MAX_MESSAGES:
        raise invalid("messages", f"{len(messages)} messages", f"at most {MAX_MESSAGES}")
    plain = [_plain(message) for message in messages]
    num_characters = sum(len(message["content"]) for message in plain)
    most = CHARACTERS_PER_TOKEN * max_context_tokens
    if num_characters > most:
        raise invalid("messages", f"{num_characters} characters", f"at most {most}")
    return plain


def checked_tools(tools: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Tools that have a form.

    Raises:
        InvalidRequest: naming the field.
    """
    if len(tools) > MAX_TOOLS:
        raise invalid("tools", f"{len(tools)} tools", f"at most {MAX_TOOLS}")
    names: set[str] = set()
    for tool in tools:
        function = tool.get("function")
        if tool.get("type") != "function" or not isinstance(function, Mapping):
            raise invalid("tools.type", tool.get("type"), '"function", with the function')
        name = function.get("name")
        if not isinstance(name, str) or not is_tool_name(name):
            raise invalid("tools.function.name", name, "1 to 64 letters, digits or any of _ . -")
        if name in names:
            raise invalid("tools.function.name", name, "a name of its own for each tool")
        names.add(name)
        if not isinstance(function.get("parameters", {}), Mapping):
            raise invalid("tools.function.parameters", function["parameters"], "a JSON Schema, an object")
    return [copy.deepcopy(dict(tool)) for tool in tools]


def _plain(message: Message) -> dict[str, Any]:
    role = message.get("role")
    if role not in ROLES:
        raise invalid("messages.role", role, ", ".join(sorted(ROLES)))
    plain: dict[str, Any] = {
        "role": "system" if role == "developer" else role,
        "content": _text(message.get("content")),
    }
    calls = message.get("tool_calls")
    if calls:
        if role != "assistant":
            raise invalid("messages.tool_calls", role, "a message of the assistant")
        plain["tool_calls"] = [_plain_call(call) for call in calls]
    for field in ("name", "tool_call_id"):
        if isinstance(message.get(field), str):
            plain[field] = message[field]
    return plain


def _text(content: Any) -> str:
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, Sequence):
        raise invalid("messages.content", type(content).__name__, "text, or a list of parts of type text")
    texts = []
    for part in content:
        kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
        if kind != "text" or not isinstance(part.get("text"), str):
            raise invalid("messages.content.type", kind, '"text": the models read text only')
        texts.append(part["text"])
    return "".join(texts)


def _plain_call(call: Any) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise invalid("messages.tool_calls.function", function, "a function with name and arguments")
    arguments = function.get("arguments", "{}")
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments or "{}")
        except (ValueError, RecursionError) as error:
            raise invalid("messages.tool_calls.function.arguments", arguments, f"JSON: {error}") from error
    if not isinstance(arguments, Mapping):
        raise invalid("messages.tool_calls.function.arguments", arguments, "a JSON object")
    plain = {"type": "function", "function": {"name": function["name"], "arguments": dict(arguments)}}
    return plain | ({"id": call["id"]} if isinstance(call.get("id"), str) else {})


# --- in a thread -------------------------------------------------------------------------------------------------


def _render(
    tokenizer: PreTrainedTokenizerBase,
    messages: list[dict[str, Any]],
    tools: list[dict[str, Any]],
    options: dict[str, Any],
) -> list[int]:
    if tokenizer.chat_template is None:
        limit = "the checkpoint's tokenizer has no chat template; ask for completions of text instead"
        raise invalid("messages", "chat messages", limit)
    text = _applied(tokenizer, messages, tools, options)
    if tools and text == _applied(tokenizer, messages, [], options):
        raise invalid("tools", f"{len(tools)} tools", "the model's chat template knows no tools")
    called = [index for index, message in enumerate(messages) if "tool_calls" in message]
    if called:
        without = [{**message} for message in messages]
        del without[called[-1]]["tool_calls"]
        if text == _applied(tokenizer, without, tools, options, is_try=True):
            raise invalid("messages.tool_calls", "calls", "the model's chat template knows no calls of tools")
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return ids


def _applied(
    tokenizer: PreTrainedTokenizerBase,
    messages: list[dict[str, Any]],
    tools: list[dict[str, Any]],
    options: dict[str, Any],
    *,
    is_try: bool = False,
) -> str | None:
    """What the template makes of messages; None where it takes none of that kind and it was only a try."""
    try:
        text = tokenizer.apply_chat_template(
            messages, tools=tools or None, tokenize=False, **{"add_generation_prompt": True, **options}
        )
    except Exception as error:
        if is_try:
            return None
        said = " ".join(str(error).split())[:MAX_SAID_CHARACTERS]
        raise invalid("messages", "chat messages", f"the chat template refuses them: {said}") from error
    return str(text)
