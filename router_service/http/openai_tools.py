"""`tools` and `tool_choice` of a chat request: what the model is told, what it must do, how its calls are read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from fusionroute.errors import invalid
from fusionroute.v1 import router_pb2
from router_service.chat import checked_tools
from router_service.http.openai_requests import ChatBody, NamedTool
from router_service.tool_calls import ToolCallParser


@dataclass(frozen=True, slots=True)
class ToolUse:
    """What tools mean for an answer.

    Attributes:
        tools: that the model is told of.
        parser: reads its calls; None = what it writes is text.
        constraint: makes it call; None = it may.
        is_parallel: whether it may make several calls.
    """

    tools: Sequence[Mapping[str, Any]] = ()
    parser: ToolCallParser | None = None
    constraint: router_pb2.Constraint | None = None
    is_parallel: bool = True


def tool_use(body: ChatBody, tokenizer: PreTrainedTokenizerBase) -> ToolUse:
    """What a request wants. Raises InvalidRequest: the model was not taught to call, or the choice is no tool."""
    choice = body.tool_choice
    if not body.tools:
        if choice not in (None, "none", "auto"):
            raise invalid("tool_choice", choice, "none or auto where there are no tools")
        return ToolUse()
    tools = checked_tools(body.tools)
    if choice == "none":
        return ToolUse()
    parser = ToolCallParser.of(tokenizer)
    if parser is None:
        limit = (
            "the checkpoint's chat template teaches no form of calls that is known here; leave the field out"
        )
        raise invalid("tools", f"{len(tools)} tools", limit)
    is_parallel = body.parallel_tool_calls is not False
    constraint = None
    if choice not in (None, "auto"):
        if body.response_format is not None and body.response_format.type != "text":
            raise invalid("response_format", body.response_format.type, "text where a call is demanded")
        name = choice.function.name if isinstance(choice, NamedTool) else None
        constraint = parser.constraint(tools, name=name, parallel=is_parallel and name is None)
    return ToolUse(tools, parser, constraint, is_parallel)
