"""ExpertService: messages to engine calls and back, nothing else."""

# ruff: noqa: N802 - the contract names the methods

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Any

import grpc
import torch

from expert_service import checks, watching
from expert_service.scoring import score_sequences
from expert_service.served_model import ServedModel
from fusionroute.engine import Engine, SessionView, StepCall, StepOutcome
from fusionroute.errors import FusionRouteError
from fusionroute.grpc_runtime import MAX_MESSAGE_BYTES, deadline_of
from fusionroute.v1 import expert_pb2, expert_pb2_grpc
from fusionroute.wire import identity_to_message, load_to_message, rows_to_matrix, step_error_to_message

Context = grpc.aio.ServicerContext[Any, Any]


class ExpertServicer(expert_pb2_grpc.ExpertServiceServicer):
    """One model on the wire.

    Args:
        served: its engine does the work and judges the state of sessions.
        slot: what this expert is in the router's checkpoint.
        max_message_bytes: answers that would be larger are refused before they are computed.
    """

    def __init__(
        self, served: ServedModel, slot: str = "", max_message_bytes: int = MAX_MESSAGE_BYTES
    ) -> None:
        self._served = served
        self._slot = slot
        self._max_message_bytes = max_message_bytes

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
        checks.check_answer_size([request], self._served.engine.facts, self._max_message_bytes)
        return await self._step(request, deadline_of(context))

    async def StepBatch(
        self, request: expert_pb2.StepBatchRequest, context: Context
    ) -> expert_pb2.StepBatchResponse:
        checks.check_batch(request)
        checks.check_answer_size(request.steps, self._served.engine.facts, self._max_message_bytes)
        deadline = deadline_of(context)
        results = await asyncio.gather(*(self._step_result(step, deadline) for step in request.steps))
        return expert_pb2.StepBatchResponse(results=results)

    async def CloseSession(
        self, request: expert_pb2.CloseSessionRequest, context: Context
    ) -> expert_pb2.CloseSessionResponse:
        checks.check_session_id(request.session_id)
        # A caller that hangs up must not stop what the engine has begun.
        existed = await asyncio.shield(self._served.engine.close_session(request.session_id, request.fence))
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
        self, request: expert_pb2.StepRequest, deadline: float | None
    ) -> expert_pb2.StepResult:
        try:
            return expert_pb2.StepResult(response=await self._step(request, deadline))
        except FusionRouteError as error:
            return expert_pb2.StepResult(error=step_error_to_message(error))

    async def _step(self, request: expert_pb2.StepRequest, deadline: float | None) -> expert_pb2.StepResponse:
        arrived = time.monotonic()
        try:
            with self._served.use() as engine:
                return await _step(engine, request, deadline, self._slot, arrived)
        except FusionRouteError as error:
            watching.note_failed_step(self._slot, error.reason.value, arrived)
            raise


async def _step(
    engine: Engine, request: expert_pb2.StepRequest, deadline: float | None, slot: str, arrived: float
) -> expert_pb2.StepResponse:
    checks.check_step(request, engine.facts)
    # Drafting starts from the last row, whether the caller wants to see it or not.
    num_rows = max(request.num_rows, 1) if request.draft_tokens else request.num_rows
    outcomes = [await engine.step(_step_call(request, num_rows, deadline))]
    drafted: list[int] = []
    for _ in range(request.draft_tokens):
        drafted.append(int(outcomes[-1].rows[-1].float().numpy().argmax()))
        call = StepCall(
            request.session_id, outcomes[-1].position, [drafted[-1]], 1,
            expected_epoch=request.expected_epoch, fence=request.fence, deadline=deadline,
        )  # fmt: skip
        outcomes.append(await engine.step(call))
    watching.note_step(slot, len(request.token_ids), outcomes, arrived)
    rows = outcomes[0].rows[num_rows - request.num_rows :]
    if drafted:
        rows = torch.cat([rows, *(outcome.rows for outcome in outcomes[1:])])
    return expert_pb2.StepResponse(
        rows=rows_to_matrix(rows, request.dtype),
        position=outcomes[-1].position,
        drafted_ids=drafted,
        epoch=engine.facts.epoch,
        timings=_timings(outcomes),
        load=load_to_message(engine.load()),
        num_computed_tokens=sum(outcome.num_computed_tokens for outcome in outcomes),
    )


def _step_call(request: expert_pb2.StepRequest, num_rows: int, deadline: float | None) -> StepCall:
    return StepCall(
        session_id=request.session_id,
        from_position=request.from_position,
        token_ids=list(request.token_ids),
        num_rows=num_rows,
        expected_epoch=request.expected_epoch,
        fence=request.fence,
        prefix_digest=request.prefix_digest if request.HasField("prefix_digest") else None,
        deadline=deadline,
    )


def _timings(outcomes: list[StepOutcome]) -> expert_pb2.StepTimings:
    """Waiting before the first forward, computing in all of them."""
    return expert_pb2.StepTimings(
        queue_seconds=outcomes[0].queue_seconds,
        forward_seconds=sum(outcome.forward_seconds for outcome in outcomes),
        num_forwards=sum(outcome.num_forwards for outcome in outcomes),
        max_batch_sessions=max(outcome.max_batch_sessions for outcome in outcomes),
    )


def _session_info(view: SessionView) -> expert_pb2.SessionInfo:
    return expert_pb2.SessionInfo(
        session_id=view.session_id,
        cached_length=view.cached_length,
        kv_tokens_reserved=view.kv_tokens_reserved,
        idle_seconds=view.idle_seconds,
        busy=view.busy,
        fence=view.fence,
    )
