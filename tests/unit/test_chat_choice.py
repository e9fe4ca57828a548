"""Messages as they grow, with tools: text goes out at once, calls as calls, and what only looked like one as text."""

from __future__ import annotations

import json
from typing import Any

import pytest

from fusionroute.v1.router_pb2 import FINISH_REASON_EOS, FINISH_REASON_LENGTH, Finished, Token
from router_service.http.chat_choice import ChatChoice
from router_service.http.tool_text import ToolText
from router_service.tool_calls import ToolCallParser, ToolFormat

CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'


def grown(text: str, size: int, *, is_parallel: bool = True, reason: int = FINISH_REASON_EOS) -> Any:
    """The choice after a text that came in pieces, and its chunks."""
    choice = ChatChoice(0, tool_text=ToolText(ToolCallParser(ToolFormat.HERMES), is_parallel))
    pieces = [text[start : start + size] for start in range(0, len(text), size)]
    chunks = [chunk for piece in pieces if (chunk := choice.add(Token(text=piece)))]
    return choice, [*chunks, *choice.end(Finished(reason=reason))]


def content_of(chunks: list[dict[str, Any]]) -> str:
    return "".join(chunk["delta"].get("content") or "" for chunk in chunks)


@pytest.mark.parametrize("size", [1, 3, 1000])
def test_text_comes_first_and_then_the_calls(size: int) -> None:
    choice, chunks = grown(f"I add. {CALL}\n{CALL}", size)
    message = choice.whole()["message"]
    assert message["content"] == content_of(chunks) == "I add."
    calls = [call for chunk in chunks for call in chunk["delta"].get("tool_calls", [])]
    assert [call.pop("index") for call in calls] == [0, 1]
    assert calls == message["tool_calls"]
    assert [(call["function"]["name"], json.loads(call["function"]["arguments"])) for call in calls] == [
        ("add", {"a": 1})
    ] * 2
    assert len({call["id"] for call in calls}) == 2
    assert choice.whole()["finish_reason"] == chunks[-1]["finish_reason"] == "tool_calls"


def test_calls_alone_have_no_content() -> None:
    choice, _ = grown(CALL, 2)
    assert choice.whole()["message"]["content"] is None


def test_only_one_call_where_only_one_is_wanted() -> None:
    choice, _ = grown(CALL + CALL, 5, is_parallel=False)
    assert len(choice.whole()["message"]["tool_calls"]) == 1


@pytest.mark.parametrize(
    "text", ["1 < 2 <tool", "<tool_call> not JSON", '<tool_call>\n{"name": "add", "argu']
)
def test_what_only_looks_like_a_call_is_text(text: str) -> None:
    choice, chunks = grown(text, 1, reason=FINISH_REASON_LENGTH)
    assert content_of(chunks) == choice.whole()["message"]["content"] == text
    assert "tool_calls" not in choice.whole()["message"]
    assert choice.whole()["finish_reason"] == "length"


def test_text_before_a_call_does_not_wait_for_it() -> None:
    choice = ChatChoice(0, tool_text=ToolText(ToolCallParser(ToolFormat.HERMES), True))
    first = choice.add(Token(text="Well, "))
    assert first is not None and first["delta"]["content"].startswith("Well,")
