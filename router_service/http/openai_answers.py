"""Answers in the shapes of OpenAI's API: choices as they grow, in chunks and as a whole."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

from fusionroute.v1 import router_pb2
from router_service.http.token_details import Details
from router_service.http.token_text import TokenText

LEAST_LOGPROB = -9999.0
"""What stands for the log of a probability of zero, which JSON cannot say."""

_FINISH_REASONS: dict[int, str] = {
    router_pb2.FINISH_REASON_EOS: "stop",
    router_pb2.FINISH_REASON_STOP: "stop",
    router_pb2.FINISH_REASON_LENGTH: "length",
    router_pb2.FINISH_REASON_CONTEXT: "length",
    router_pb2.FINISH_REASON_CANCELLED: "cancelled",
}


def finish_reason_of(finished: router_pb2.Finished) -> str:
    """`finish_reason`; "cancelled", which OpenAI does not have, when someone has ended the turn from outside."""
    return _FINISH_REASONS[finished.reason]


class Choice(Protocol):
    """One of the answers to a request."""

    def begin(self, started: router_pb2.Started) -> list[dict[str, Any]]:
        """Chunks before the first token."""

    def add(self, token: router_pb2.Token) -> dict[str, Any] | None:
        """The chunk for a token; None where there is nothing to tell yet."""

    def end(self, finished: router_pb2.Finished) -> dict[str, Any]:
        """The last chunk."""

    def whole(self) -> dict[str, Any]:
        """The choice after its end."""


@dataclass(slots=True)
class Scored:
    """Log-probabilities of tokens.

    Attributes:
        num_top: so many best tokens with each; None = none are told.
        text: of tokens.
    """

    num_top: int | None
    text: TokenText

    def logprob(self, value: float) -> float:
        """As JSON can say it."""
        return max(value, LEAST_LOGPROB)

    def best(self, token: router_pb2.Token | router_pb2.PromptToken) -> list[tuple[int, float]]:
        """Ids with their log-probabilities, the best first; the token itself has the same number here as alone."""
        own = self.logprob(token.logprob)
        return [
            (each.id, own if each.id == token.id else self.logprob(each.logprob))
            for each in token.top.fused[: self.num_top or 0]
        ]


@dataclass(slots=True)
class ChatChoice:
    """A message."""

    index: int
    scored: Scored
    details: Details | None
    _pieces: list[str] = field(default_factory=list)
    _entries: list[dict[str, Any]] = field(default_factory=list)
    _finish_reason: str | None = None

    def begin(self, started: router_pb2.Started) -> list[dict[str, Any]]:
        """The role."""
        return [self._chunk({"role": "assistant", "content": ""})]

    def add(self, token: router_pb2.Token) -> dict[str, Any] | None:
        """The piece of text that a token adds."""
        self._pieces.append(token.text)
        entries = None
        if self.scored.num_top is not None:
            entries = [self._entry(token)]
            self._entries += entries
        details = self.details.add(token) if self.details is not None else None
        if not token.text and entries is None and details is None:
            return None
        return self._chunk({"content": token.text}, entries, None, details)

    def end(self, finished: router_pb2.Finished) -> dict[str, Any]:
        """What was held back, and why it ended."""
        self._pieces.append(finished.text)
        self._finish_reason = finish_reason_of(finished)
        details = self.details.end(finished) if self.details is not None else None
        delta = {"content": finished.text} if finished.text else {}
        return self._chunk(delta, None, self._finish_reason, details)

    def whole(self) -> dict[str, Any]:
        """The message."""
        choice: dict[str, Any] = {
            "index": self.index,
            "message": {"role": "assistant", "content": "".join(self._pieces), "refusal": None},
            "logprobs": None,
            "finish_reason": self._finish_reason,
        }
        if self.scored.num_top is not None:
            choice["logprobs"] = {"content": self._entries, "refusal": None}
        if self.details is not None:
            choice["fusionroute"] = self.details.whole()
        return choice

    def _chunk(
        self,
        delta: dict[str, Any],
        entries: list[dict[str, Any]] | None = None,
        finish_reason: str | None = None,
        details: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        logprobs = None if entries is None else {"content": entries, "refusal": None}
        chunk = {"index": self.index, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}
        if details is not None:
            chunk["fusionroute"] = details
        return chunk

    def _entry(self, token: router_pb2.Token) -> dict[str, Any]:
        entry = self._named(token.id, self.scored.logprob(token.logprob))
        entry["top_logprobs"] = [self._named(each, logprob) for each, logprob in self.scored.best(token)]
        return entry

    def _named(self, token_id: int, logprob: float) -> dict[str, Any]:
        text = self.scored.text
        return {"token": text.text_of(token_id), "logprob": logprob, "bytes": list(text.bytes_of(token_id))}


@dataclass(slots=True)
class TextChoice:
    """A continuation of a text."""

    index: int
    scored: Scored
    details: Details | None
    _pieces: list[str] = field(default_factory=list)
    _num_characters: int = 0
    _scores: dict[str, list[Any]] = field(
        default_factory=lambda: {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
    )
    _finish_reason: str | None = None

    def begin(self, started: router_pb2.Started) -> list[dict[str, Any]]:
        """Nothing comes before the text."""
        return []

    def add(self, token: router_pb2.Token) -> dict[str, Any] | None:
        """The piece of text that a token adds."""
        scores = self._score(token) if self.scored.num_top is not None else None
        self._grow(token.text)
        details = self.details.add(token) if self.details is not None else None
        if not token.text and scores is None and details is None:
            return None
        return self._chunk(token.text, scores, None, details)

    def end(self, finished: router_pb2.Finished) -> dict[str, Any]:
        """What was held back, and why it ended."""
        self._grow(finished.text)
        self._finish_reason = finish_reason_of(finished)
        details = self.details.end(finished) if self.details is not None else None
        return self._chunk(finished.text, None, self._finish_reason, details)

    def whole(self) -> dict[str, Any]:
        """The text."""
        choice: dict[str, Any] = {
            "index": self.index,
            "text": "".join(self._pieces),
            "logprobs": None if self.scored.num_top is None else self._scores,
            "finish_reason": self._finish_reason,
        }
        if self.details is not None:
            choice["fusionroute"] = self.details.whole()
        return choice

    def _grow(self, text: str) -> None:
        self._pieces.append(text)
        self._num_characters += len(text)

    def _score(self, token: router_pb2.Token | router_pb2.PromptToken) -> dict[str, list[Any]]:
        logprob = self.scored.logprob(token.logprob) if token.HasField("logprob") else None
        best: dict[str, float] = {}
        if logprob is not None:
            for each, value in self.scored.best(token):
                best.setdefault(self.scored.text.text_of(each), value)
            best.setdefault(self.scored.text.text_of(token.id), logprob)
        new: dict[str, list[Any]] = {
            "tokens": [self.scored.text.text_of(token.id)],
            "token_logprobs": [logprob],
            "top_logprobs": [best if logprob is not None else None],
            "text_offset": [self._num_characters],
        }
        for name, values in new.items():
            self._scores[name] += values
        return new

    def _chunk(
        self,
        text: str,
        scores: dict[str, list[Any]] | None,
        finish_reason: str | None,
        details: dict[str, Any] | None,
    ) -> dict[str, Any]:
        chunk: dict[str, Any] = {
            "index": self.index,
            "text": text,
            "logprobs": scores,
            "finish_reason": finish_reason,
        }
        if details is not None:
            chunk["fusionroute"] = details
        return chunk
