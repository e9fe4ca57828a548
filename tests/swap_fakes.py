"""A slot of the registry, experts and a launcher in memory: all that a swap deals with, failing when told to."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Collection, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from fusionroute.errors import FusionRouteError, InternalFault, Reason, SessionStateError, Unavailable
from fusionroute.launching import Launch, Launched, LaunchFailed
from fusionroute.swapping.parts import Parts, Step, Timing
from fusionroute.v1 import common_pb2, expert_pb2, registry_pb2
from fusionroute.v1.registry_pb2 import (
    EXPERT_STATE_DRAINING,
    EXPERT_STATE_READY,
    EXPERT_STATE_STANDBY,
    ExpertEntry,
)

QUICK = Timing(
    start_seconds=0.3,
    register_seconds=0.2,
    flip_seconds=0.2,
    drain_seconds=0.3,
    idle_seconds=1.0,
    poll_seconds=0.01,
)
READY, DRAINING, STANDBY = EXPERT_STATE_READY, EXPERT_STATE_DRAINING, EXPERT_STATE_STANDBY


def a_model(weights: str = "w", **changes: object) -> common_pb2.ModelIdentity:
    """An identity that fits the others."""
    fields = {
        "name": weights,
        "weights_fingerprint": weights,
        "tokenizer_fingerprint": "words",
        "logits_width": 61,
        "max_context_tokens": 96,
        "epoch": 1,
    }
    return common_pb2.ModelIdentity(**fields | changes)  # type: ignore[arg-type]


@dataclass
class FakeRegistry:
    """One registry. `failures` are raised by the next swaps, before or (with `is_lossy`) after they happened."""

    entries: dict[str, ExpertEntry] = field(default_factory=dict)
    revision: int = 1
    failures: list[FusionRouteError] = field(default_factory=list)
    is_lossy: bool = False
    is_away: bool = False
    retired: list[str] = field(default_factory=list)
    on_list: Callable[[], None] = lambda: None

    def enter(
        self, name: str, state: registry_pb2.ExpertState.ValueType, model: common_pb2.ModelIdentity
    ) -> None:
        self.entries[name] = ExpertEntry(
            instance_id=name,
            slot="math",
            address=f"{name}:1",
            model=model,
            state=state,
            epoch=int(state == READY),
        )

    def states(self) -> dict[str, registry_pb2.ExpertState.ValueType]:
        return {name: entry.state for name, entry in self.entries.items()}

    async def list(self) -> registry_pb2.ListExpertsResponse:
        self.on_list()
        if self.is_away:
            raise Unavailable(Reason.STORE_UNAVAILABLE, "the registry is away")
        return registry_pb2.ListExpertsResponse(experts=self.entries.values(), revision=self.revision)

    async def drain(
        self, instance_id: str, expected_revision: int, policy: registry_pb2.DrainPolicy.ValueType
    ) -> registry_pb2.DrainExpertResponse:
        self.entries[instance_id].state = DRAINING
        return registry_pb2.DrainExpertResponse(revision=self.revision)

    async def swap(
        self,
        slot: str,
        instance_ids: Collection[str],
        expected_revision: int,
        policy: registry_pb2.DrainPolicy.ValueType,
    ) -> registry_pb2.SwapExpertsResponse:
        assert slot == "math"
        if self.failures and not self.is_lossy:
            raise self.failures.pop(0)
        if expected_revision != self.revision:
            raise SessionStateError(Reason.REVISION_CONFLICT, "old")
        serving = [name for name, entry in self.entries.items() if entry.state == READY]
        self.retired = [name for name in serving if name not in instance_ids]
        self._serve(instance_ids)
        if self.failures:
            raise self.failures.pop(0)
        return registry_pb2.SwapExpertsResponse(
            revision=self.revision, epoch=self.revision, retired_instance_ids=self.retired
        )

    async def roll_back(
        self, slot: str, expected_revision: int, policy: registry_pb2.DrainPolicy.ValueType
    ) -> registry_pb2.RollbackSwapResponse:
        if not self.retired:
            raise SessionStateError(Reason.NOTHING_TO_ROLL_BACK, "nothing")
        back, self.retired = self.retired, []
        self._serve(back)
        return registry_pb2.RollbackSwapResponse(
            revision=self.revision, epoch=self.revision, instance_ids=back
        )

    def _serve(self, names: Collection[str]) -> None:
        self.revision += 1
        for name, entry in self.entries.items():
            if name in names:
                entry.state, entry.epoch = READY, self.revision
            elif entry.state == READY:
                entry.state = DRAINING


@dataclass
class FakeExpert:
    """One expert: how well it scores, and what its sessions do."""

    model: common_pb2.ModelIdentity
    nats: float = -1.0
    is_finite: bool = True
    busy_until: float = 0.0

    async def info(self) -> expert_pb2.GetInfoResponse:
        return expert_pb2.GetInfoResponse(model=self.model)

    async def warm_up(self, token_ids: Sequence[int]) -> None:
        if not self.is_finite:
            raise InternalFault(Reason.NON_FINITE_LOGITS, "not finite")

    async def continue_greedily(self, token_ids: Sequence[int], num_tokens: int) -> list[int]:
        return [1] * num_tokens

    async def answer_log_probs(self, sequences: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[float]:
        return [self.nats for _, answer in sequences for _ in answer]

    async def sessions(self) -> list[expert_pb2.SessionInfo]:
        is_busy = time.monotonic() < self.busy_until
        return [expert_pb2.SessionInfo(session_id="s", busy=is_busy, idle_seconds=0.0 if is_busy else 9.0)]

    async def reload(self, timeout_seconds: float) -> expert_pb2.ReloadResponse:
        self.model.epoch += 1
        return expert_pb2.ReloadResponse(model=self.model)


@dataclass
class Stage:
    """A launcher and everything around it: "old" serves the slot math, "new" can be started.

    Attributes:
        enters: whether the new expert comes into the registry once it is started.
        dies: whether it has ended by the time it is looked at.
    """

    registry: FakeRegistry = field(default_factory=FakeRegistry)
    experts: dict[str, FakeExpert] = field(default_factory=dict)
    running: set[str] = field(default_factory=set)
    stopped: list[str] = field(default_factory=list)
    told: list[tuple[Step, str]] = field(default_factory=list)
    enters: bool = True
    serves: bool = True
    dies: bool = False
    start_seconds: float = 0.0
    start_error: LaunchFailed | None = None
    on_tell: Callable[[Step], None] = lambda step: None

    def __post_init__(self) -> None:
        self.experts = {"old": FakeExpert(a_model("a")), "new": FakeExpert(a_model("b"))}
        self.registry.enter("old", READY, self.experts["old"].model)
        self.running = {"old"}

    def parts(self, timing: Timing = QUICK) -> Parts:
        return Parts(self.registry, self, self.open, self.tell, timing)

    def tell(self, step: Step, detail: str) -> None:
        self.told.append((step, detail))
        self.on_tell(step)

    @asynccontextmanager
    async def open(self, address: str) -> AsyncIterator[FakeExpert]:
        yield self.experts[address.removesuffix(":1")]

    def start(self, launch: Launch) -> Launched:
        time.sleep(self.start_seconds)
        if self.start_error is not None:
            raise self.start_error
        self.running.add("new")
        if self.enters:
            self.registry.enter("new", STANDBY, self.experts["new"].model)
        return Launched("new")

    def address_of(self, launched: Launched) -> str:
        return f"{launched.name}:1" if self.serves else ""

    def check(self, launched: Launched) -> None:
        if self.dies or launched.name not in self.running:
            raise LaunchFailed(f"{launched.name} ended", ["last words"])

    def log_tail(self, launched: Launched) -> list[str]:
        return ["so far"]

    def keep(self, launched: Launched) -> None:
        return None

    def reach(self, address: str) -> str:
        return address

    def find(self, address: str) -> Launched | None:
        name = address.removesuffix(":1")
        return Launched(name) if name in self.running else None

    def stop(self, launched: Launched, deadline_seconds: float) -> None:
        if launched.name in self.running:
            self.running.remove(launched.name)
            self.stopped.append(launched.name)
        self.registry.entries.pop(launched.name, None)


async def until_told(stage: Stage, step: Step) -> None:
    """Waits until a swap has come to a step."""
    async with asyncio.timeout(10):
        while step not in {each for each, _ in stage.told}:
            await asyncio.sleep(0.005)
