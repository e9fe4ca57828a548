"""ExpertService: messages to engine calls and back, nothing else."""

# ruff: noqa: N802 - the contract names the methods

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing, suppress
from typing import Any

import grpc

from expert_service import checks
from expert_service.scoring import score_sequences
from expert_service.served_model import ServedModel
from expert_service.step_stream import Requests, Responses, StepStream
from expert_service.stepping import Stepping
from fusionroute.engine import SessionView
from fusionroute.errors import FusionRouteError
from fusionroute.grpc_runtime import MAX_MESSAGE_BYTES
from fusionroute.v1 import expert_pb2, expert_pb2_grpc
from fusionroute.wire import identity_to_message, load_to_message, step_error_to_message

Context = grpc.aio.ServicerContext[Any, Any]


class ExpertServicer(expert_pb2_grpc.ExpertServiceServicer):
    """One model on the wire.

    Args:
        served: its engine does the work and judges the state of sessions.
        slot: what this expert is in the router's checkpoint.
        max_message_bytes: answers that would be larger are refused before they are computed.
        takes_lines: whether callers of this host may send their messages over a socket of their own.
    """

    def __init__(
        self,
        served: ServedModel,
        slot: str = "",
        max_message_bytes: int = MAX_MESSAGE_BYTES,
        *,
        takes_lines: bool = True,
    ) -> None:
        self._served = served
        self._slot = slot
        self._max_message_bytes = max_message_bytes
        self._takes_lines = takes_lines
        self._stepping = Stepping(served, slot, max_message_bytes)
        self._streams: set[StepStream] = set()
        self._is_stopping = False

    async def GetInfo(
        self, request: expert_pb2.GetInfoRequest, context: Context
    ) -> expert_pb2.GetInfoResponse:
        return expert_pb2.GetInfoResponse(
            model=identity_to_message(self._served.engine.facts),
            load=load_to_message(self._served.engine.load()),
            slot=self._slot,
            draining=self._served.draining,
        )

    async def Step(self, request: expert_pb2.StepRequest, context: Context) -> expert_pb2.StepResponse:
        return await self._step(request, context.time_remaining())

    async def StepBatch(
        self, request: expert_pb2.StepBatchRequest, context: Context
    ) -> expert_pb2.StepBatchResponse:
        checks.check_batch(request)
        checks.check_answer_size(request.steps, self._served.engine.facts, self._max_message_bytes)
        seconds = context.time_remaining()
        results = await asyncio.gather(*(self._step_result(step, seconds) for step in request.steps))
        return expert_pb2.StepBatchResponse(results=results)

    async def StepStream(  # type: ignore[override]  # `service_of` has them encoded
        self, request_iterator: Requests, context: Context
    ) -> Responses:
        stream = StepStream(self._stepping, self._streams.discard, takes_lines=self._takes_lines)
        self._streams.add(stream)
        if self._is_stopping:
            stream.end_when_idle()
        async with aclosing(stream.answers(request_iterator)) as responses:
            async for response in responses:
                yield response

    def end_streams(self) -> None:
        """Lets streams end as soon as all their steps are answered: callers keep them open for ever otherwise."""
        self._is_stopping = True
        for stream in list(self._streams):
            stream.end_when_idle()

    async def CloseSession(
        self, request: expert_pb2.CloseSessionRequest, context: Context
    ) -> expert_pb2.CloseSessionResponse:
        checks.check_session_id(request.session_id)
        # A caller that hangs up must not stop what the engine has begun.
        closing = self._served.engine.close_session(
            request.session_id, request.fence, for_good=not request.may_share
        )
        existed = await asyncio.shield(closing)
        return expert_pb2.CloseSessionResponse(existed=existed)

    async def ListSessions(
        self, request: expert_pb2.ListSessionsRequest, context: Context
    ) -> expert_pb2.ListSessionsResponse:
        limit = min(request.limit or checks.DEFAULT_LIST_LIMIT, checks.MOST_LISTED)
        views, num_sessions = await asyncio.shield(self._served.engine.list_sessions(limit))
        return expert_pb2.ListSessionsResponse(
            sessions=[_session_info(view) for view in views], num_sessions=num_sessions
        )

    async def Score(
        self, request: expert_pb2.ScoreRequest, context: Context
    ) -> AsyncIterator[expert_pb2.ScoreResponse]:
        with self._served.use() as engine:
            checks.check_score(request, engine.facts)
            async for response in score_sequences(engine, request, self._max_message_bytes):
                yield response

    async def Reload(self, request: expert_pb2.ReloadRequest, context: Context) -> expert_pb2.ReloadResponse:
        facts, previous_epoch = await self._served.reload()
        return expert_pb2.ReloadResponse(model=identity_to_message(facts), previous_epoch=previous_epoch)

    async def _step_result(
        self, request: expert_pb2.StepRequest, seconds: float | None
    ) -> expert_pb2.StepResult:
        try:
            return expert_pb2.StepResult(response=await self._step(request, seconds))
        except FusionRouteError as error:
            return expert_pb2.StepResult(error=step_error_to_message(error))

    async def _step(self, request: expert_pb2.StepRequest, seconds: float | None) -> expert_pb2.StepResponse:
        begun = self._stepping.begin(request, seconds)
        with suppress(FusionRouteError):  # told of by the response
            await begun.future
        return begun.response()


def _session_info(view: SessionView) -> expert_pb2.SessionInfo:
    return expert_pb2.SessionInfo(
        session_id=view.session_id,
        cached_length=view.cached_length,
        kv_tokens_reserved=view.kv_tokens_reserved,
        idle_seconds=view.idle_seconds,
        busy=view.busy,
        fence=view.fence,
    )
