"""What a swap is made with: the registry, experts, a launcher, someone to tell, and how long things may take."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from enum import Enum
from typing import Protocol, TypeAlias

from fusionroute.launching import Launcher
from fusionroute.swapping.canary import Scorer
from fusionroute.v1 import registry_pb2
from fusionroute.v1.expert_pb2 import GetInfoResponse, ReloadResponse, SessionInfo
from fusionroute.v1.registry_pb2 import EXPERT_STATE_READY, DrainPolicy, ExpertEntry, ListExpertsResponse

Policy: TypeAlias = DrainPolicy.ValueType


class Step(Enum):
    """What a swap is at; the value is for people."""

    START = "start"
    SERVE = "load"
    COMPARE = "compare"
    REGISTER = "register"
    WARM_UP = "warm up"
    CANARY = "canary"
    FLIP = "flip"
    DRAIN = "drain"
    STOP = "stop"


OnProgress: TypeAlias = Callable[[Step, str], None]
"""Told a step and what it has come to."""


class SwapFailed(Exception):
    """A swap did not come about, or not to its end; the message says why, and what serves now.

    Attributes:
        step: at which it failed.
        log_tail: the last lines of the new expert, where they may explain it.
    """

    def __init__(self, step: Step, message: str, log_tail: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.step = step
        self.log_tail = list(log_tail)


class SwapRefused(SwapFailed):
    """The new expert cannot take the slot as it is, or somebody else has changed the slot; trying again cannot help."""


class Registry(Protocol):
    """As `registry_client.RegistryClient`."""

    async def list(self) -> ListExpertsResponse:
        """The living entries and the revision."""

    async def drain(
        self, instance_id: str, expected_revision: int, policy: Policy
    ) -> registry_pb2.DrainExpertResponse:
        """Lets an instance be asked no longer than the policy says."""

    async def swap(
        self, slot: str, instance_ids: Collection[str], expected_revision: int, policy: Policy
    ) -> registry_pb2.SwapExpertsResponse:
        """Lets these instances serve the slot."""

    async def roll_back(
        self, slot: str, expected_revision: int, policy: Policy
    ) -> registry_pb2.RollbackSwapResponse:
        """Undoes the latest swap."""


class Expert(Scorer, Protocol):
    """As `expert_client.ExpertClient`."""

    async def info(self) -> GetInfoResponse:
        """Which model this is."""

    async def warm_up(self, token_ids: Sequence[int]) -> None:
        """Feeds tokens one by one."""

    async def sessions(self) -> list[SessionInfo]:
        """The sessions it has cached."""

    async def reload(self, timeout_seconds: float) -> ReloadResponse:
        """Loads the weights anew."""


OpenExpert: TypeAlias = Callable[[str], AbstractAsyncContextManager[Expert]]
"""Opens the expert at host:port."""


@dataclass(frozen=True, slots=True)
class Timing:
    """How long things may take, in seconds.

    Attributes:
        start_seconds: for loading the model.
        register_seconds: from serving to standing in the registry.
        flip_seconds: for trying the flip again while the registry is away or changing.
        drain_seconds: for the sessions of the old expert to leave it.
        idle_seconds: a session that was not asked for for so long has left.
        stop_seconds: for an expert to end by itself.
        poll_seconds: between two looks.
    """

    start_seconds: float = 300.0
    register_seconds: float = 30.0
    flip_seconds: float = 30.0
    drain_seconds: float = 60.0
    idle_seconds: float = 2.0
    stop_seconds: float = 25.0
    poll_seconds: float = 0.2


@dataclass(frozen=True, slots=True)
class Parts:
    """Everything outside that a swap deals with."""

    registry: Registry
    launcher: Launcher
    open_expert: OpenExpert
    tell: OnProgress = lambda step, detail: None
    timing: Timing = field(default_factory=Timing)
    clock: Callable[[], float] = time.monotonic


def of_slot(entries: Sequence[ExpertEntry], slot: str) -> list[ExpertEntry]:
    """The instances of a slot."""
    return [entry for entry in entries if entry.slot == slot]


def ready(entries: Sequence[ExpertEntry], slot: str) -> list[ExpertEntry]:
    """The instances that serve a slot."""
    return [entry for entry in of_slot(entries, slot) if entry.state == EXPERT_STATE_READY]
