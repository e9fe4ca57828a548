"""Choices of OpenAI's API as they grow: a chunk for each event, and the whole at the end."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

from fusionroute.v1 import router_pb2
from router_service.http.token_details import Details
from router_service.http.token_scores import TokenScores
from router_service.live_turn import LiveTurn

FINISH_REASONS: dict[int, str] = {
    router_pb2.FINISH_REASON_EOS: "stop",
    router_pb2.FINISH_REASON_STOP: "stop",
    router_pb2.FINISH_REASON_LENGTH: "length",
    router_pb2.FINISH_REASON_CONTEXT: "length",
    router_pb2.FINISH_REASON_CANCELLED: "cancelled",
}
"""`finish_reason`; "cancelled", which OpenAI does not have, when someone has ended the turn from outside."""


class Choice(Protocol):
    """One of the answers to a request."""

    def begin(self, live: LiveTurn, from_token: int) -> list[dict[str, Any]]:
        """The turn that writes it has begun; chunks before its token number `from_token`, the first that comes."""

    def add(self, token: router_pb2.Token) -> dict[str, Any] | None:
        """The chunk for a token; None where there is nothing to tell yet."""

    def end(self, finished: router_pb2.Finished) -> list[dict[str, Any]]:
        """The last chunks."""

    def whole(self) -> dict[str, Any]:
        """The choice after its end."""


@dataclass(frozen=True, slots=True)
class Echo:
    """The prompt, which comes first in an answer.

    Attributes:
        text: as it was given.
        tokens: with their log-probabilities, if these are told.
    """

    text: str
    tokens: tuple[router_pb2.PromptToken, ...] = ()


@dataclass(slots=True)
class TextChoice:
    """A continuation of a text.

    Attributes:
        scores: log-probabilities of its tokens; None = none are told.
        details: what our extension tells; None = nothing.
        echo: None = without the prompt.
    """

    index: int
    scores: TokenScores | None = None
    details: Details | None = None
    echo: Echo | None = None
    _pieces: list[str] = field(default_factory=list)
    _num_characters: int = 0
    _told: dict[str, list[Any]] = field(
        default_factory=lambda: {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
    )
    _finish_reason: str | None = None

    def begin(self, live: LiveTurn, from_token: int) -> list[dict[str, Any]]:
        """The prompt, where it is wanted."""
        if self.details is not None:
            self.details.begin(live)
        if from_token:
            self._num_characters = sum(len(each.text) for each in live.tokens[:from_token])
            return []
        return self._echoed()

    def add(self, token: router_pb2.Token) -> dict[str, Any] | None:
        """The piece of text that a token adds."""
        told = self._score(token) if self.scores is not None else None
        self._grow(token.text)
        details = self.details.add(token) if self.details is not None else None
        if not token.text and told is None and details is None:
            return None
        return self._chunk(token.text, told, None, details)

    def end(self, finished: router_pb2.Finished) -> list[dict[str, Any]]:
        """What was held back, and why it ended."""
        self._grow(finished.text)
        self._finish_reason = FINISH_REASONS[finished.reason]
        details = self.details.end(finished) if self.details is not None else None
        return [self._chunk(finished.text, None, self._finish_reason, details)]

    def alone(self) -> list[dict[str, Any]]:
        """The prompt and nothing behind it."""
        self._finish_reason = "length"
        return [*self._echoed(), self._chunk("", None, self._finish_reason, None)]

    def whole(self) -> dict[str, Any]:
        """The text."""
        details = self.details.whole() if self.details is not None else None
        told = None if self.scores is None else self._told
        return self._chunk("".join(self._pieces), told, self._finish_reason, details)

    def _echoed(self) -> list[dict[str, Any]]:
        if self.echo is None:
            return []
        told: dict[str, list[Any]] | None = None
        if self.scores is not None:
            before, self._num_characters = self._num_characters, 0
            for token in self.echo.tokens:
                self._score(token)
                self._num_characters += len(token.text)
            if self.echo.tokens:  # which nothing comes before: without the space that it has elsewhere
                self._told["tokens"][0] = self.echo.tokens[0].text or self._told["tokens"][0]
            self._num_characters = before
            told = {name: list(values) for name, values in self._told.items()}
        self._grow(self.echo.text)
        return [self._chunk(self.echo.text, told, None, None)]

    def _grow(self, text: str) -> None:
        self._pieces.append(text)
        self._num_characters += len(text)

    def _score(self, token: router_pb2.Token | router_pb2.PromptToken) -> dict[str, list[Any]]:
        assert self.scores is not None
        new = {name: [value] for name, value in self.scores.of_text(token, self._num_characters).items()}
        for name, values in new.items():
            self._told[name] += values
        return new

    def _chunk(
        self,
        text: str,
        told: dict[str, list[Any]] | None,
        finish_reason: str | None,
        details: dict[str, Any] | None,
    ) -> dict[str, Any]:
        chunk: dict[str, Any] = {
            "index": self.index,
            "text": text,
            "logprobs": told,
            "finish_reason": finish_reason,
        }
        if details is not None:
            chunk["fusionroute"] = details
        return chunk
