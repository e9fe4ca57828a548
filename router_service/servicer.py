"""RouterService: translates between messages and the turn keeper."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator, AsyncIterator
from typing import TYPE_CHECKING, Any

import grpc

from fusionroute.errors import FusionRouteError
from fusionroute.fusion import CombineRule
from fusionroute.rpc_context import bind_request
from fusionroute.v1 import router_pb2, router_pb2_grpc
from fusionroute.wire import identity_to_message, load_to_message
from router_service import metrics
from router_service.experts import Directory
from router_service.live_turn import LiveTurn
from router_service.prompt_scoring import PromptScorer
from router_service.serving import ServedCheckpoints
from router_service.session_store import SessionStore
from router_service.stored_session import SessionState
from router_service.turn_events import FINISH_MESSAGES, events_of
from router_service.turn_keeper import TurnKeeper
from router_service.turn_request import POLICY_MESSAGES, RULE_MESSAGES

if TYPE_CHECKING:
    Context = grpc.aio.ServicerContext[Any, Any]

_STATE_MESSAGES = {
    SessionState.EMPTY: router_pb2.SESSION_STATE_UNSPECIFIED,
    SessionState.RUNNING: router_pb2.SESSION_STATE_RUNNING,
    SessionState.FINISHED: router_pb2.SESSION_STATE_FINISHED,
}


class RouterServicer(router_pb2_grpc.RouterServiceServicer):
    """The router's API for applications."""

    def __init__(
        self,
        keeper: TurnKeeper,
        store: SessionStore,
        served: ServedCheckpoints,
        directory: Directory,
        scorer: PromptScorer,
    ) -> None:
        self._keeper = keeper
        self._store = store
        self._served = served
        self._directory = directory
        self._scorer = scorer

    async def Generate(  # noqa: N802
        self, request: router_pb2.GenerateRequest, context: Context
    ) -> AsyncIterator[router_pb2.GenerateResponse]:
        try:
            live = await self._keeper.generate(request)
        except FusionRouteError as error:
            metrics.REJECTIONS.labels(reason=error.reason.value).inc()
            raise
        bind_request(live.request_id)
        async with contextlib.aclosing(self._events(live, 0)) as events:
            async for event in events:
                yield router_pb2.GenerateResponse(event=event)

    async def Resume(  # noqa: N802
        self, request: router_pb2.ResumeRequest, context: Context
    ) -> AsyncIterator[router_pb2.ResumeResponse]:
        live = await self._keeper.resume(request.session_id, request.from_token)
        bind_request(live.request_id)
        async with contextlib.aclosing(self._events(live, request.from_token)) as events:
            async for event in events:
                yield router_pb2.ResumeResponse(event=event)

    async def Cancel(self, request: router_pb2.CancelRequest, context: Context) -> router_pb2.CancelResponse:  # noqa: N802
        return router_pb2.CancelResponse(was_running=await self._keeper.cancel(request.session_id))

    async def GetSession(  # noqa: N802
        self, request: router_pb2.GetSessionRequest, context: Context
    ) -> router_pb2.GetSessionResponse:
        stored = await self._store.get(request.session_id)
        response = router_pb2.GetSessionResponse(
            session_id=stored.session_id,
            state=_STATE_MESSAGES[stored.state],
            token_ids=stored.records["token_id"].tolist(),
            expires_in_seconds=stored.expires_in_seconds,
        )
        if stored.turn is not None:
            parameters = stored.turn.parameters
            response.answer_position = stored.turn.answer_position
            response.answer_text = await self._keeper.answer_text(stored)
            response.seed = parameters.seed
            response.combine = RULE_MESSAGES[CombineRule(parameters.combine)]
            response.checkpoint = parameters.checkpoint
            if stored.turn.finish_reason is not None:
                response.finish_reason = FINISH_MESSAGES[stored.turn.finish_reason]
        return response

    async def DeleteSession(  # noqa: N802
        self, request: router_pb2.DeleteSessionRequest, context: Context
    ) -> router_pb2.DeleteSessionResponse:
        existed = await self._keeper.delete(request.session_id)
        await self._keeper.closer.forget(request.session_id)
        return router_pb2.DeleteSessionResponse(existed=existed)

    async def ScorePrompt(  # noqa: N802
        self, request: router_pb2.ScorePromptRequest, context: Context
    ) -> AsyncIterator[router_pb2.ScorePromptResponse]:
        try:
            async with contextlib.aclosing(self._scorer.score(request)) as responses:
                async for response in responses:
                    yield response
        except FusionRouteError as error:
            metrics.REJECTIONS.labels(reason=error.reason.value).inc()
            raise

    async def GetRouterInfo(  # noqa: N802
        self, request: router_pb2.GetRouterInfoRequest, context: Context
    ) -> router_pb2.GetRouterInfoResponse:
        serving, promotion = self._served.current, self._served.promotion
        offer = serving.offer
        return router_pb2.GetRouterInfoResponse(
            model=identity_to_message(serving.engine.facts),
            checkpoint=offer.checkpoint,
            default_combine=RULE_MESSAGES[offer.default_rule],
            available_combine=[RULE_MESSAGES[rule] for rule in offer.rules],
            slots=[self._slot(slot) for slot in offer.slots],
            load=load_to_message(serving.engine.load()),
            num_running_generations=self._keeper.num_running,
            checkpoint_id=serving.checkpoint_id,
            promotion_revision=promotion.revision,
            promotion_error=promotion.error,
            num_retiring_checkpoints=len(self._served.retiring),
            default_on_expert_unavailable=POLICY_MESSAGES[offer.default_policy],
            base=None if serving.ensemble.base is None else self._slot(serving.ensemble.base.slot),
        )

    def _slot(self, slot: str) -> router_pb2.ExpertSlot:
        instance = self._directory.best(slot)
        if instance is None:
            return router_pb2.ExpertSlot(slot=slot)
        return router_pb2.ExpertSlot(
            slot=slot, address=instance.entry.address, ready=instance.is_ready, model=instance.entry.model
        )

    def _events(self, live: LiveTurn, from_token: int) -> AsyncGenerator[router_pb2.GenerationEvent, None]:
        return events_of(live, from_token, self._served.current.tokenizer)
