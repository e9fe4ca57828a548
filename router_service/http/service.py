"""What HTTP handlers ask of the router: the same calls that its gRPC servicer answers, in this process."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from fusionroute.errors import FusionRouteError
from fusionroute.health import ServerHealth
from fusionroute.metrics import Exposition
from fusionroute.v1 import router_pb2
from router_service import metrics
from router_service.experts import Directory
from router_service.live_turn import LiveTurn
from router_service.prompt_scoring import PromptScorer
from router_service.serving import ServedCheckpoints
from router_service.turn_events import events_of
from router_service.turn_keeper import TurnKeeper
from router_service.turn_request import Offer


@dataclass(frozen=True, slots=True)
class RouterApi:
    """The router behind its HTTP APIs.

    Attributes:
        exposition: what /metrics shows.
        served_name: of the model.
        max_new_tokens: of a chat request that names no limit.
    """

    keeper: TurnKeeper
    served: ServedCheckpoints
    directory: Directory
    health: ServerHealth
    exposition: Exposition
    scorer: PromptScorer
    served_name: str = "fusionroute"
    max_new_tokens: int = 2048

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Of the current checkpoint."""
        return self.served.current.tokenizer

    @property
    def offer(self) -> Offer:
        """What the current checkpoint can do."""
        return self.served.current.offer

    async def begin(self, request: router_pb2.GenerateRequest) -> LiveTurn:
        """Begins a turn. Raises FusionRouteError: the request cannot be served; nothing was written."""
        try:
            return await self.keeper.generate(request)
        except FusionRouteError as error:
            metrics.REJECTIONS.labels(reason=error.reason.value).inc()
            raise

    async def resume(self, session_id: str, from_token: int) -> LiveTurn:
        """As `TurnKeeper.resume`."""
        return await self.keeper.resume(session_id, from_token)

    def events(self, live: LiveTurn, from_token: int = 0) -> AsyncGenerator[router_pb2.GenerationEvent, None]:
        """As `turn_events.events_of`; to be closed by whoever stops reading."""
        return events_of(live, from_token, self.tokenizer)
