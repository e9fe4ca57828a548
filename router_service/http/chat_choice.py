"""A message of a chat completion as it grows."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from fusionroute.v1 import router_pb2
from router_service.http.openai_answers import FINISH_REASONS
from router_service.http.token_details import Details
from router_service.http.token_scores import TokenScores
from router_service.http.tool_text import ToolText
from router_service.live_turn import LiveTurn
from router_service.tool_calls import ToolCall, new_call_id


@dataclass(slots=True)
class ChatChoice:
    """A message.

    Attributes:
        scores: log-probabilities of its tokens; None = none are told.
        details: what our extension tells; None = nothing.
        tool_text: tells text from calls; None = all is text.
    """

    index: int
    scores: TokenScores | None = None
    details: Details | None = None
    tool_text: ToolText | None = None
    _calls: list[dict[str, Any]] = field(default_factory=list)
    _pieces: list[str] = field(default_factory=list)
    _told: list[dict[str, Any]] = field(default_factory=list)
    _finish_reason: str | None = None

    def begin(self, live: LiveTurn, from_token: int) -> list[dict[str, Any]]:
        """The role."""
        if self.details is not None:
            self.details.begin(live)
        for token in live.tokens[:from_token]:  # which the client has
            self._said(token.text)
        return [] if from_token else [self._chunk({"role": "assistant", "content": ""})]

    def add(self, token: router_pb2.Token) -> dict[str, Any] | None:
        """The piece of text that a token adds."""
        text, told = self._said(token.text), None
        if self.scores is not None:
            told = [self.scores.of_chat(token)]
            self._told += told
        details = self.details.add(token) if self.details is not None else None
        if not text and told is None and details is None:
            return None
        return self._chunk({"content": text}, told, None, details)

    def end(self, finished: router_pb2.Finished) -> list[dict[str, Any]]:
        """What was held back, and why it ended."""
        text = self._said(finished.text)
        self._finish_reason = FINISH_REASONS[finished.reason]
        if self.tool_text is not None:
            rest, calls = self.tool_text.finish()
            text += rest
            self._pieces.append(rest)
            self._calls = [_told_call(call) for call in calls]
        if self._calls:
            self._finish_reason = "tool_calls"
        details = self.details.end(finished) if self.details is not None else None
        chunks = [self._chunk({"content": text})] if text else []
        for number, call in enumerate(self._calls):
            chunks.append(self._chunk({"tool_calls": [{"index": number, **call}]}))
        return [*chunks, self._chunk({}, None, self._finish_reason, details)]

    def whole(self) -> dict[str, Any]:
        """The message."""
        content: str | None = "".join(self._pieces)
        message: dict[str, Any] = {"role": "assistant", "content": content, "refusal": None}
        if self._calls:
            message |= {"content": content or None, "tool_calls": self._calls}
        choice: dict[str, Any] = {
            "index": self.index,
            "message": message,
            "logprobs": None if self.scores is None else {"content": self._told, "refusal": None},
            "finish_reason": self._finish_reason,
        }
        if self.details is not None:
            choice["fusionroute"] = self.details.whole()
        return choice

    def _said(self, text: str) -> str:
        """What of a text may be told now."""
        if self.tool_text is not None:
            text = self.tool_text.push(text)
        self._pieces.append(text)
        return text

    def _chunk(
        self,
        delta: dict[str, Any],
        told: list[dict[str, Any]] | None = None,
        finish_reason: str | None = None,
        details: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        logprobs = None if told is None else {"content": told, "refusal": None}
        chunk = {"index": self.index, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}
        if details is not None:
            chunk["fusionroute"] = details
        return chunk


def _told_call(call: ToolCall) -> dict[str, Any]:
    function = {"name": call.name, "arguments": call.arguments}
    return {"id": new_call_id(), "type": "function", "function": function}
