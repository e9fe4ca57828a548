"""A message of a chat completion as it grows."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from fusionroute.v1 import router_pb2
from router_service.http.openai_answers import FINISH_REASONS
from router_service.http.token_details import Details
from router_service.http.token_scores import TokenScores
from router_service.live_turn import LiveTurn


@dataclass(slots=True)
class ChatChoice:
    """A message.

    Attributes:
        scores: log-probabilities of its tokens; None = none are told.
        details: what our extension tells; None = nothing.
    """

    index: int
    scores: TokenScores | None = None
    details: Details | None = None
    _pieces: list[str] = field(default_factory=list)
    _told: list[dict[str, Any]] = field(default_factory=list)
    _finish_reason: str | None = None

    def begin(self, live: LiveTurn, from_token: int) -> list[dict[str, Any]]:
        """The role."""
        if self.details is not None:
            self.details.begin(live)
        return [] if from_token else [self._chunk({"role": "assistant", "content": ""})]

    def add(self, token: router_pb2.Token) -> dict[str, Any] | None:
        """The piece of text that a token adds."""
        self._pieces.append(token.text)
        told = None
        if self.scores is not None:
            told = [self.scores.of_chat(token)]
            self._told += told
        details = self.details.add(token) if self.details is not None else None
        if not token.text and told is None and details is None:
            return None
        return self._chunk({"content": token.text}, told, None, details)

    def end(self, finished: router_pb2.Finished) -> list[dict[str, Any]]:
        """What was held back, and why it ended."""
        self._pieces.append(finished.text)
        self._finish_reason = FINISH_REASONS[finished.reason]
        details = self.details.end(finished) if self.details is not None else None
        held = [self._chunk({"content": finished.text})] if finished.text else []
        return [*held, self._chunk({}, None, self._finish_reason, details)]

    def whole(self) -> dict[str, Any]:
        """The message."""
        choice: dict[str, Any] = {
            "index": self.index,
            "message": {"role": "assistant", "content": "".join(self._pieces), "refusal": None},
            "logprobs": None if self.scores is None else {"content": self._told, "refusal": None},
            "finish_reason": self._finish_reason,
        }
        if self.details is not None:
            choice["fusionroute"] = self.details.whole()
        return choice

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
