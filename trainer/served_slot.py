"""One expert slot over the wire: whoever serves it now is asked for scores, and found again after a restart."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass

import grpc
import numpy as np
import structlog
from numpy.typing import NDArray

from fusionroute.access import ClientAccess
from fusionroute.client import RouterClient
from fusionroute.errors import FusionRouteError, InternalFault, Reason, TrainingFailed, Unavailable
from fusionroute.grpc_runtime import backoff_seconds, channel, error_from_rpc
from fusionroute.router_model import ExpertRecord
from fusionroute.v1 import expert_pb2, expert_pb2_grpc
from fusionroute.v1.registry_pb2 import EXPERT_STATE_READY, ExpertEntry

CALL_SECONDS = 120.0

_PASSING = frozenset(
    {
        Reason.EXPERT_UNAVAILABLE,
        Reason.STORE_UNAVAILABLE,
        Reason.DRAINING,
        Reason.DEADLINE_PASSED,
        Reason.QUEUE_FULL,
        Reason.KV_MEMORY_FULL,
    }
)

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Scores:
    """Of positions 0 to L - 2 of one sequence: what the next token's log-prob is, and the first choice."""

    gold_logprobs: NDArray[np.float32]
    argmax_ids: NDArray[np.int32]


class ServedSlot:
    """Whoever serves a slot, found again after a restart. Use as an asynchronous context manager."""

    def __init__(self, slot: str, router: str, record: ExpertRecord | None, patience_seconds: float) -> None:
        self.slot = slot
        self.max_context_tokens = 0
        self._router = router
        self._record = record
        self._patience_seconds = patience_seconds
        self._last_answer = time.monotonic()
        self._connection: grpc.aio.Channel | None = None
        self._address = ""
        self._connecting = asyncio.Lock()

    async def __aenter__(self) -> ServedSlot:
        await self._connect("")
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._connection is not None:
            await self._connection.close()

    async def find(self) -> ExpertEntry:
        """The entry of the newest ready instance, waiting for one within the patience."""
        attempt = 0
        while True:
            try:
                return await self._look_up()
            except FusionRouteError as error:
                await self._pause(error, attempt)
                attempt += 1

    async def score(self, ids: list[int]) -> Scores:
        """Scores of a sequence; tries again, elsewhere if need be, while failures may pass."""
        attempt = 0
        while True:
            address, connection = self._address, self._connection
            assert connection is not None
            try:
                scores = await _score(connection, address, ids)
                self._last_answer = time.monotonic()
                return scores
            except FusionRouteError as error:
                await self._pause(error, attempt)
                attempt += 1
                await self._connect(address)

    async def _pause(self, error: FusionRouteError, attempt: int) -> None:
        """Waits after a failure that may pass; raises it where it will not, or where patience has ended."""
        silent_seconds = time.monotonic() - self._last_answer
        if error.reason not in _PASSING or silent_seconds > self._patience_seconds:
            raise error
        log.info("expert_asked_again", slot=self.slot, reason=error.reason.value, message=error.message)
        await asyncio.sleep(max(backoff_seconds(attempt), error.retry_after_seconds or 0.0))

    async def _connect(self, failed_address: str) -> None:
        """Connects anew, unless another task has done so since `failed_address` failed."""
        async with self._connecting:
            if self._connection is not None and self._address != failed_address:
                return
            entry = await self.find()
            self.max_context_tokens = entry.model.max_context_tokens
            if entry.address == self._address:
                return
            old, self._address = self._connection, entry.address
            self._connection = channel(entry.address, access=ClientAccess.from_environment())
            if old is not None:
                await old.close()

    async def _look_up(self) -> ExpertEntry:
        async with RouterClient.open(self._router) as router:
            entries = await router.list_experts()
        mine = [e for e in entries if e.slot == self.slot and e.state == EXPERT_STATE_READY]
        if not mine:
            raise Unavailable(
                Reason.EXPERT_UNAVAILABLE,
                f"no expert serves slot {self.slot!r} at the router {self._router}",
                metadata={"slot": self.slot},
            )
        entry = max(mine, key=lambda e: e.model.epoch)
        self._check_same(entry)
        return entry

    def _check_same(self, entry: ExpertEntry) -> None:
        wanted = self._record
        if wanted is not None and entry.model.weights_fingerprint != wanted.weights_fingerprint:
            raise TrainingFailed(
                Reason.EXPERTS_MISMATCH,
                f"slot {self.slot!r} is served with weights {entry.model.weights_fingerprint} now; the labels "
                f"were begun with {wanted.weights_fingerprint}",
            )


async def _score(connection: grpc.aio.Channel, address: str, ids: list[int]) -> Scores:
    """One `Score` call of one sequence of L tokens, gathered to ``[L - 1]``."""
    request = expert_pb2.ScoreRequest(
        sequences=[expert_pb2.TokenSequence(token_ids=ids)], output=expert_pb2.SCORE_OUTPUT_LOG_PROBS
    )
    gold = np.empty(len(ids) - 1, np.float32)
    argmax = np.empty(len(ids) - 1, np.int32)
    done = 0
    call = expert_pb2_grpc.ExpertServiceStub(connection).Score(request, timeout=CALL_SECONDS)
    try:
        async for answer in call:
            chunk = np.frombuffer(answer.gold_log_probs, dtype="<f4")
            end = done + len(chunk)
            if answer.from_position != done or len(answer.argmax_ids) != len(chunk) or end > len(gold):
                raise InternalFault(Reason.INTERNAL, f"{address} answered out of order at position {done}")
            gold[done:end], argmax[done:end] = chunk, answer.argmax_ids
            done = end
    except grpc.aio.AioRpcError as error:
        raise error_from_rpc(error, address) from None
    except asyncio.CancelledError:
        task = asyncio.current_task()
        if task is None or task.cancelling():
            raise
        # Another task has closed the connection to connect anew; to this one, the expert has gone.
        raise Unavailable(Reason.EXPERT_UNAVAILABLE, f"the connection to {address} was closed") from None
    finally:
        call.cancel()
    if done != len(gold):
        raise InternalFault(Reason.INTERNAL, f"{address} scored {done} of {len(gold)} positions")
    return Scores(gold, argmax)
