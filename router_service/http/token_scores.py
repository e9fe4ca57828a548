"""Log-probabilities of tokens in the two forms that OpenAI's API has for them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fusionroute.v1 import router_pb2
from router_service.http.token_text import TokenText

LEAST_LOGPROB = -9999.0
"""What stands for the log of a probability of zero, which JSON cannot say."""


@dataclass(frozen=True, slots=True)
class TokenScores:
    """Of a choice's tokens.

    Attributes:
        num_top: so many best tokens with each.
        text: of tokens.
    """

    num_top: int
    text: TokenText

    def of_chat(self, token: router_pb2.Token) -> dict[str, Any]:
        """As chat completions tell it."""
        entry = self._named(token.id, _known(token))
        entry["top_logprobs"] = [self._named(each, logprob) for each, logprob in self._best(token)]
        return entry

    def of_text(self, token: router_pb2.Token | router_pb2.PromptToken, offset: int) -> dict[str, Any]:
        """As completions tell it: one value for each of their four lists.

        Args:
            token: of the answer or of the prompt.
            offset: characters of text before it.
        """
        logprob = _known(token)
        best: dict[str, float] | None = None
        if logprob is not None:
            best = {}
            for each, value in self._best(token):
                best.setdefault(self.text.text_of(each), value)
            best.setdefault(self.text.text_of(token.id), logprob)
        return {
            "tokens": self.text.text_of(token.id),
            "token_logprobs": logprob,
            "top_logprobs": best,
            "text_offset": offset,
        }

    def _named(self, token_id: int, logprob: float | None) -> dict[str, Any]:
        text, number = self.text.text_of(token_id), self.text.bytes_of(token_id)
        return {"token": text, "logprob": logprob, "bytes": list(number)}

    def _best(self, token: router_pb2.Token | router_pb2.PromptToken) -> list[tuple[int, float]]:
        """Ids with their log-probabilities, the best first; the token itself has the same number here as alone."""
        own = _known(token)
        return [
            (each.id, own if each.id == token.id and own is not None else max(each.logprob, LEAST_LOGPROB))
            for each in token.top.fused[: self.num_top]
        ]


def _known(token: router_pb2.Token | router_pb2.PromptToken) -> float | None:
    return max(token.logprob, LEAST_LOGPROB) if token.HasField("logprob") else None
