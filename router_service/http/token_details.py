"""What our extension tells of each token: who wrote it, how the router weighed the experts, what else was likely."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from google.protobuf.json_format import MessageToDict

from fusionroute.v1 import router_pb2
from router_service.http.token_scores import LEAST_LOGPROB
from router_service.live_turn import LiveTurn

ROUTER_WEIGHT = "router"


@dataclass(slots=True)
class Details:
    """Of one turn.

    Attributes:
        num_candidates: so many best tokens by each.
    """

    num_candidates: int
    _live: LiveTurn | None = None
    _tokens: list[dict[str, Any]] = field(default_factory=list)
    _summary: dict[str, Any] = field(default_factory=dict)

    def begin(self, live: LiveTurn) -> None:
        """The turn has begun."""
        self._live = live

    def add(self, token: router_pb2.Token) -> dict[str, Any]:
        """For the chunk of a token."""
        told = self._token(token)
        self._tokens.append(told)
        return {"tokens": [told]}

    def end(self, finished: router_pb2.Finished) -> dict[str, Any]:
        """For the last chunk."""
        assert self._live is not None
        turn = self._live.turn
        statistics = MessageToDict(
            finished.statistics, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
        )
        self._summary = {
            "statistics": statistics,
            "session_id": self._live.session_id,
            "seed": turn.sampling.seed,
            "combine": turn.rule.value,
            "checkpoint": turn.checkpoint,
        }
        return {"tokens": [], **self._summary}

    def whole(self) -> dict[str, Any]:
        """For a choice that is complete."""
        return {"tokens": self._tokens, **self._summary}

    def _token(self, token: router_pb2.Token) -> dict[str, Any]:
        assert self._live is not None
        names = (*self._live.turn.slots, ROUTER_WEIGHT)
        told: dict[str, Any] = {
            "index": token.index,
            "id": token.id,
            "text": token.text,
            "logprob": max(token.logprob, LEAST_LOGPROB) if token.HasField("logprob") else None,
            "expert": token.expert or None,
            "expert_epoch": token.expert_epoch,
            "degraded": token.degraded,
            "weights": dict(zip(names, token.routing_weights, strict=False)),
        }
        if self.num_candidates:
            told["top"] = {
                "fused": self._best(token.top.fused),
                "expert": self._best(token.top.expert),
                "complement": self._best(token.top.router),
            }
        return told

    def _best(self, candidates: Sequence[router_pb2.Candidate]) -> list[dict[str, Any]]:
        return [
            {"id": each.id, "text": each.text, "logprob": max(each.logprob, LEAST_LOGPROB)}
            for each in candidates[: self.num_candidates]
        ]
