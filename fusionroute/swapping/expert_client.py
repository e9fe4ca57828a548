"""One expert asked directly, by whoever tries it before it serves."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from uuid import uuid4

import grpc
import numpy as np

from fusionroute.access import ClientAccess
from fusionroute.calls import answer_of, answers_of
from fusionroute.errors import InternalFault, Reason
from fusionroute.grpc_runtime import channel
from fusionroute.v1 import expert_pb2, expert_pb2_grpc
from fusionroute.v1.expert_pb2 import GetInfoResponse, ReloadResponse, SessionInfo
from fusionroute.wire import matrix_to_numpy

INFO_TIMEOUT_SECONDS = 5.0
STEP_TIMEOUT_SECONDS = 60.0
MAX_DRAFT_TOKENS = 64  # of one step, as the service limits it


class ExpertClient:
    """One connection to an expert. All methods raise FusionRouteError as the expert meant it."""

    def __init__(self, connection: grpc.aio.Channel, address: str) -> None:
        self.address = address
        self._expert = expert_pb2_grpc.ExpertServiceStub(connection)

    @classmethod
    @asynccontextmanager
    async def open(cls, address: str, access: ClientAccess | None = None) -> AsyncIterator[ExpertClient]:
        """A client for the expert at host:port, for as long as the block lasts."""
        async with channel(address, access=access) as connection:
            yield cls(connection, address)

    async def info(self) -> GetInfoResponse:
        """Which model this is and how busy it is."""
        call = self._expert.GetInfo(expert_pb2.GetInfoRequest(), timeout=INFO_TIMEOUT_SECONDS)
        return await answer_of(call, self.address)

    async def warm_up(self, token_ids: Sequence[int]) -> None:
        """Feeds tokens one by one in a session that ends with it.

        Raises:
            FusionRouteError: as the expert meant it; NON_FINITE_LOGITS when a row is not finite.
        """
        session_id = f"warm-up:{uuid4().hex}"
        width = (await self.info()).model.logits_width
        try:
            for position, token_id in enumerate(token_ids):
                request = expert_pb2.StepRequest(
                    session_id=session_id, from_position=position, token_ids=[token_id], num_rows=1
                )
                call = self._expert.Step(request, timeout=STEP_TIMEOUT_SECONDS)
                rows = matrix_to_numpy((await answer_of(call, self.address)).rows, width)
                if not np.isfinite(rows).all():
                    message = f"{self.address} gave logits that are not finite at position {position}"
                    raise InternalFault(Reason.NON_FINITE_LOGITS, message)
        finally:
            await self._close(session_id)

    async def continue_greedily(self, token_ids: Sequence[int], num_tokens: int) -> list[int]:
        """The tokens that the expert itself would write after these, each the most likely one."""
        session_id = f"canary:{uuid4().hex}"
        written: list[int] = []
        fed: list[int] = list(token_ids)
        position = 0
        try:
            while len(written) < num_tokens:
                request = expert_pb2.StepRequest(
                    session_id=session_id,
                    from_position=position,
                    token_ids=fed,
                    num_rows=1,
                    draft_tokens=min(num_tokens - len(written), MAX_DRAFT_TOKENS),
                )
                call = self._expert.Step(request, timeout=STEP_TIMEOUT_SECONDS)
                answer = await answer_of(call, self.address)
                written.extend(answer.drafted_ids)
                # The last drafted one is fed again, which costs nothing and gives its row.
                position, fed = answer.position - 1, [written[-1]]
        finally:
            await self._close(session_id)
        return written

    async def answer_log_probs(self, sequences: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[float]:
        """For each (prompt, answer) in token ids: the log-probs of the answer's tokens, all in one list."""
        tokens = [expert_pb2.TokenSequence(token_ids=[*prompt, *answer]) for prompt, answer in sequences]
        request = expert_pb2.ScoreRequest(sequences=tokens)
        call = self._expert.Score(request, timeout=STEP_TIMEOUT_SECONDS * 5)
        found: list[float] = []
        async for chunk in answers_of(call, self.address):
            first_answer = len(sequences[chunk.sequence_index][0]) - 1  # position p predicts token p + 1
            log_probs = np.frombuffer(chunk.gold_log_probs, "<f4")
            found.extend(float(each) for each in log_probs[max(0, first_answer - chunk.from_position) :])
        return found

    async def sessions(self) -> list[SessionInfo]:
        """The sessions it has cached, the most recently used first."""
        call = self._expert.ListSessions(
            expert_pb2.ListSessionsRequest(limit=100), timeout=INFO_TIMEOUT_SECONDS
        )
        return list((await answer_of(call, self.address)).sessions)

    async def reload(self, timeout_seconds: float) -> ReloadResponse:
        """Loads the weights anew; they are served when this returns."""
        call = self._expert.Reload(expert_pb2.ReloadRequest(), timeout=timeout_seconds)
        return await answer_of(call, self.address)

    async def _close(self, session_id: str) -> None:
        request = expert_pb2.CloseSessionRequest(session_id=session_id)
        await answer_of(self._expert.CloseSession(request, timeout=INFO_TIMEOUT_SECONDS), self.address)
