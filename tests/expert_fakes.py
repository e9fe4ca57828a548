"""Stand-ins around the expert service: an engine with known logits, a registry in memory, a served expert."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import torch

from expert_service.bootstrap import progress_of, service_of
from expert_service.served_model import ServedModel
from expert_service.servicer import ExpertServicer
from fusionroute.engine import Closing, Engine, EngineLoad, ModelFacts, SessionView, StepCall, StepOutcome
from fusionroute.errors import FusionRouteError, InvalidRequest, ModelRejected, Reason, SessionStateError
from fusionroute.grpc_runtime import RunningServer, Service, channel, server
from fusionroute.v1 import expert_pb2_grpc, registry_pb2, registry_pb2_grpc

WIDTH = 11


def successor(token_id: int) -> int:
    """The token that `KnownEngine` always finds most likely after another."""
    return (3 * token_id + 1) % WIDTH


class KnownEngine:
    """An engine whose logits are a fixed function of the last token.

    An unset `gate` holds its steps back, `errors` are raised by the next steps, a forgetful one evicts every
    session after its step.
    """

    def __init__(self, dtype: str = "float32") -> None:
        self.facts = ModelFacts("known", "weights", "vocabulary", WIDTH, "fake", dtype, 1000, 5)
        self.calls: list[StepCall] = []
        self.lengths: dict[str, int] = {}
        self.num_forwards = 0
        self.num_waiting = 0
        self.errors: list[FusionRouteError] = []
        self.is_forgetful = False
        self.gate = asyncio.Event()
        self.gate.set()
        self.num_closing = 0
        self.let_go_of: list[Closing] = []
        self.closing_gate = asyncio.Event()
        self.closing_gate.set()
        self._dtype = getattr(torch, dtype)

    def rows(self, token_ids: Sequence[int]) -> torch.Tensor:
        """Row t: 2 at the successor of token t, (column / 16) elsewhere; exact in every format."""
        rows = torch.arange(WIDTH).div(16).repeat(len(token_ids), 1)
        for row, token_id in zip(rows, token_ids, strict=True):
            row[successor(token_id)] = 2.0
        return rows.to(self._dtype)

    async def step(self, call: StepCall) -> StepOutcome:
        self.calls.append(call)
        self.num_waiting += 1
        try:
            await self.gate.wait()
        finally:
            self.num_waiting -= 1
        if self.errors:
            raise self.errors.pop(0)
        cached = self.lengths.get(call.session_id)
        if cached is None and call.from_position > 0:
            raise SessionStateError(Reason.SESSION_UNKNOWN, "unknown")
        if cached is not None and call.from_position > cached:
            raise SessionStateError(Reason.POSITION_AHEAD, "ahead", metadata={"cached_length": str(cached)})
        self.num_forwards += 1
        length = self.lengths[call.session_id] = call.from_position + len(call.token_ids)
        if self.is_forgetful:
            del self.lengths[call.session_id]
        wanted = [call.token_ids[index] for index in call.row_indices] or list(
            call.token_ids[len(call.token_ids) - call.num_rows :]
        )
        drafted = list[int]()
        for _ in range(call.draft.num_tokens if call.draft is not None else 0):
            drafted.append(successor(drafted[-1] if drafted else call.token_ids[-1]))
        if drafted and not self.is_forgetful:
            self.lengths[call.session_id] = length = length + len(drafted)
        return StepOutcome(
            self.rows([*wanted, *drafted]), None, length, len(call.token_ids) + len(drafted), 0.5, 0.25,
            1 + len(drafted), len(self.lengths), tuple(drafted),
        )  # fmt: skip

    def submit(self, call: StepCall) -> asyncio.Future[StepOutcome]:
        return asyncio.ensure_future(self.step(call))

    async def close_session(self, session_id: str, fence: int = 0, *, for_good: bool = False) -> bool:
        self.num_closing += 1
        await self.closing_gate.wait()
        self.num_closing -= 1
        return self.lengths.pop(session_id, None) is not None

    def let_go(self, closings: Sequence[Closing]) -> None:
        for each in closings:
            self.let_go_of.append(each)
            self.lengths.pop(each.session_id, None)

    async def list_sessions(self, limit: int) -> tuple[list[SessionView], int]:
        views = [SessionView(name, length, 64, 0.5, False, 2) for name, length in self.lengths.items()]
        return views[:limit], len(views)

    def load(self) -> EngineLoad:
        return EngineLoad(len(self.lengths), self.num_waiting, 8, 64, 128, self.num_forwards, 3)

    async def drain(self, timeout_seconds: float) -> None:
        return None


@asynccontextmanager
async def served_expert(
    engine: Engine | KnownEngine, *, slot: str = "math", **options: Any
) -> AsyncIterator[tuple[expert_pb2_grpc.ExpertServiceAsyncStub, RunningServer, ExpertServicer]]:
    """An expert on a free port, and a stub that reaches it."""
    real = cast(Engine, engine)
    size = {name: value for name, value in options.items() if name == "max_message_bytes"}
    servicer = ExpertServicer(ServedModel(real), slot, **size)
    async with (
        server([service_of(servicer)], progress=lambda: progress_of(real), **options) as running,
        channel(running.address) as open_channel,
    ):
        yield expert_pb2_grpc.ExpertServiceStub(open_channel), running, servicer


@dataclass
class MemoryRegistry(registry_pb2_grpc.RegistryServiceServicer):
    """A registry in memory that remembers what it was asked, and refuses when told to."""

    # ruff: noqa: N802 - the contract names the methods
    lease_seconds: float = 0.15
    refusal: FusionRouteError | None = None
    entries: dict[str, registry_pb2.RegisterExpertRequest] = field(default_factory=dict)
    registered_at: list[float] = field(default_factory=list)
    heartbeats: list[registry_pb2.HeartbeatRequest] = field(default_factory=list)
    state: registry_pb2.ExpertState.ValueType = registry_pb2.EXPERT_STATE_READY

    async def RegisterExpert(self, request: Any, context: Any) -> registry_pb2.RegisterExpertResponse:
        self.registered_at.append(time.monotonic())
        if self.refusal is not None:
            raise self.refusal
        self.entries[request.instance_id] = request
        return registry_pb2.RegisterExpertResponse(
            lease_seconds=self.lease_seconds, revision=1, state=self.state, epoch=1
        )

    async def Heartbeat(self, request: Any, context: Any) -> registry_pb2.HeartbeatResponse:
        if request.instance_id not in self.entries:
            raise SessionStateError(Reason.LEASE_EXPIRED, f"no lease for {request.instance_id}")
        self.heartbeats.append(request)
        return registry_pb2.HeartbeatResponse(lease_seconds=self.lease_seconds, state=self.state)

    async def DeregisterExpert(self, request: Any, context: Any) -> registry_pb2.DeregisterExpertResponse:
        existed = self.entries.pop(request.instance_id, None) is not None
        return registry_pb2.DeregisterExpertResponse(existed=existed)

    async def ListExperts(self, request: Any, context: Any) -> registry_pb2.ListExpertsResponse:
        entries = [
            registry_pb2.ExpertEntry(instance_id=entry.instance_id, slot=entry.slot, address=entry.address)
            for entry in self.entries.values()
        ]
        return registry_pb2.ListExpertsResponse(experts=entries, revision=1)

    async def WatchExperts(
        self, request: Any, context: Any
    ) -> AsyncIterator[registry_pb2.WatchExpertsResponse]:
        listed = await self.ListExperts(request, context)
        yield registry_pb2.WatchExpertsResponse(experts=listed.experts, revision=listed.revision)

    async def DrainExpert(self, request: Any, context: Any) -> registry_pb2.DrainExpertResponse:
        return registry_pb2.DrainExpertResponse(revision=1)

    async def SwapExperts(self, request: Any, context: Any) -> registry_pb2.SwapExpertsResponse:
        return registry_pb2.SwapExpertsResponse(revision=1, epoch=2)

    async def RollbackSwap(self, request: Any, context: Any) -> registry_pb2.RollbackSwapResponse:
        return registry_pb2.RollbackSwapResponse(revision=1, epoch=3)


def registry_service(registry: MemoryRegistry) -> Service:
    """As `grpc_runtime.server` takes it."""
    return Service(
        "fusionroute.v1.RegistryService",
        lambda grpc_server: registry_pb2_grpc.add_RegistryServiceServicer_to_server(registry, grpc_server),
    )


def wrong_vocabulary() -> FusionRouteError:
    """The refusal of an expert that speaks another vocabulary."""
    return ModelRejected(Reason.VOCABULARY_MISMATCH, "tokenizer abc, the checkpoint wants def")


def unknown_slot() -> FusionRouteError:
    """The refusal of a slot that the checkpoint lacks."""
    return InvalidRequest(Reason.UNKNOWN_SLOT, "slot 'math' is not in the checkpoint")


async def until(condition: Callable[[], bool], timeout_seconds: float = 10.0) -> None:
    """Waits for a condition; TimeoutError when it does not come true."""
    async with asyncio.timeout(timeout_seconds):
        while not condition():
            await asyncio.sleep(0.01)
