"""Keeps the expert registered with a router's registry for as long as it serves.

register --lease--> heartbeat every third of it --LEASE_EXPIRED, other weights--> register ...
   |                    |
   | refused            | router gone: go on with the next one, the lease may outlive the gap
   v
say so, pause, register again (the router may serve another checkpoint by then)
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Self

import grpc
import structlog

from expert_service import metrics
from fusionroute.background import end_task
from fusionroute.errors import (
    AccessDenied,
    FusionRouteError,
    InternalFault,
    InvalidRequest,
    ModelRejected,
    Reason,
)
from fusionroute.grpc_runtime import backoff_seconds, error_from_rpc
from fusionroute.v1 import common_pb2, registry_pb2, registry_pb2_grpc

log = structlog.get_logger(__name__)

CALL_TIMEOUT_SECONDS = 5.0
SHORTEST_TIMEOUT_SECONDS = 0.5
DEREGISTER_TIMEOUT_SECONDS = 2.0
REFUSALS = (ModelRejected, InvalidRequest, InternalFault, AccessDenied)


@dataclass(frozen=True, slots=True)
class Registration:
    """What is registered.

    Attributes:
        instance_id: unique for each process.
        slot: of the router's checkpoint.
        address: host:port at which routers reach this expert.
        model: what it serves.
        standby: wait to be swapped in instead of serving.
    """

    instance_id: str
    slot: str
    address: str
    model: common_pb2.ModelIdentity
    standby: bool = False


class Registrar:
    """Registers and renews in a task of its own while its context lasts; deregisters at the end.

    Args:
        channels: to routers of one registry, of which one at a time is used; the caller owns them.
        registration: what to register.
        load: how busy the expert is, for each heartbeat.
        refused_retry_seconds: pause after the router refused.
        most_backoff_seconds: longest pause while the router is not there.
    """

    def __init__(
        self,
        channels: Sequence[grpc.aio.Channel],
        registration: Registration,
        load: Callable[[], common_pb2.Load],
        *,
        refused_retry_seconds: float = 30.0,
        most_backoff_seconds: float = 10.0,
    ) -> None:
        assert channels
        self._registries = [registry_pb2_grpc.RegistryServiceStub(each) for each in channels]
        self._registration = registration
        self._load = load
        self._refused_retry_seconds = refused_retry_seconds
        self._most_backoff_seconds = most_backoff_seconds
        self._log = log.bind(slot=registration.slot, instance=registration.instance_id)
        self._task: asyncio.Task[None] | None = None
        self._num_failures = 0
        self._wake = asyncio.Event()
        self._draining = False
        self._announced = registration
        self.state: registry_pb2.ExpertState.ValueType = registry_pb2.EXPERT_STATE_UNSPECIFIED
        """What the registry has said last; unspecified until it has spoken."""
        self._lease_until = 0.0

    async def __aenter__(self) -> Self:
        self._task = asyncio.create_task(self._run())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.leave()

    def announce(self, model: common_pb2.ModelIdentity) -> None:
        """Registers anew at once: this expert serves another model now."""
        self._registration = replace(self._registration, model=model)
        self._wake.set()

    def begin_drain(self) -> None:
        """Tells the registry, at once and from now on, that this expert is about to stop."""
        self._draining = True
        self._wake.set()

    async def leave(self) -> None:
        """Stops renewing and leaves the registry; may be called twice, and without a router."""
        if self._task is None:
            return
        await end_task(self._task)
        self._task = None
        self._lease_until = 0.0
        request = registry_pb2.DeregisterExpertRequest(instance_id=self._registration.instance_id)
        for _ in self._registries:
            try:
                await self._registry.DeregisterExpert(request, timeout=DEREGISTER_TIMEOUT_SECONDS)
            except grpc.aio.AioRpcError as rpc_error:
                error = error_from_rpc(rpc_error)
                self._log.warning("deregister_failed", reason=error.reason.value, message=error.message)
                self._turn_to_next()
            else:
                self._log.info("deregistered")
                return

    @property
    def is_registered(self) -> bool:
        """Whether the registry holds a lease of this expert, as far as is known here."""
        return time.monotonic() < self._lease_until

    @property
    def _registry(self) -> registry_pb2_grpc.RegistryServiceAsyncStub:
        return self._registries[0]

    def _turn_to_next(self) -> None:
        self._registries.append(self._registries.pop(0))

    async def _run(self) -> None:
        while True:
            try:
                lease_seconds = await self._register()
                await self._renew(lease_seconds)
            except Exception:
                # Serving goes on without a registry; this task must not die for any surprise.
                self._log.exception("registrar_failed")
                await self._pause()

    async def _register(self) -> float:
        """Tries until the registry grants a lease; returns its seconds."""
        while True:
            mine = self._announced = self._registration
            request = registry_pb2.RegisterExpertRequest(
                instance_id=mine.instance_id,
                slot=mine.slot,
                address=mine.address,
                model=mine.model,
                standby=self._is_to_stand_by(),
            )
            try:
                answer = await self._registry.RegisterExpert(request, timeout=CALL_TIMEOUT_SECONDS)
            except grpc.aio.AioRpcError as rpc_error:
                error = error_from_rpc(rpc_error)
                metrics.REGISTRATIONS.labels(outcome=error.reason.value).inc()
                await self._endure(error, "register_failed")
            else:
                metrics.REGISTRATIONS.labels(outcome="ok").inc()
                self._num_failures = 0
                self._log.info(
                    "registered",
                    address=mine.address,
                    lease_seconds=answer.lease_seconds,
                    load_epoch=mine.model.epoch,
                    epoch=answer.epoch,
                )
                self._lease_until = time.monotonic() + answer.lease_seconds
                self._note(answer.state)
                return float(answer.lease_seconds)

    def _is_to_stand_by(self) -> bool:
        """Whether this expert must not serve by itself where the registry has forgotten it."""
        if self.state == registry_pb2.EXPERT_STATE_UNSPECIFIED:
            return self._registration.standby
        return self.state != registry_pb2.EXPERT_STATE_READY

    async def _renew(self, lease_seconds: float) -> None:
        """Sends heartbeats until the registry says that the lease is gone, or there is another model to announce."""
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout(lease_seconds / 3):
                    await self._wake.wait()
            self._wake.clear()
            if self._announced is not self._registration:
                return
            request = registry_pb2.HeartbeatRequest(
                instance_id=self._registration.instance_id, load=self._load(), draining=self._draining
            )
            # Another router must be asked before the lease ends.
            timeout = min(CALL_TIMEOUT_SECONDS, max(lease_seconds / 3, SHORTEST_TIMEOUT_SECONDS))
            try:
                answer = await self._registry.Heartbeat(request, timeout=timeout)
            except grpc.aio.AioRpcError as rpc_error:
                error = error_from_rpc(rpc_error)
                metrics.HEARTBEATS.labels(outcome=error.reason.value).inc()
                if error.reason is Reason.LEASE_EXPIRED:
                    self._lease_until = 0.0
                    self._log.warning("lease_expired", message=error.message)
                    return
                await self._endure(error, "heartbeat_failed")
                self._wake.set()
                continue
            metrics.HEARTBEATS.labels(outcome="ok").inc()
            self._num_failures = 0
            lease_seconds = answer.lease_seconds or lease_seconds
            self._lease_until = time.monotonic() + lease_seconds
            self._note(answer.state)

    def _note(self, state: registry_pb2.ExpertState.ValueType) -> None:
        if state not in (self.state, registry_pb2.EXPERT_STATE_UNSPECIFIED):
            before, self.state = self.state, state
            names = {"state": _state_name(state), "before": _state_name(before)}
            self._log.info("registry_state", **names)

    async def _endure(self, error: FusionRouteError, event: str) -> None:
        """Says what is wrong, then pauses: long after a refusal, ever longer while the router is away."""
        self._turn_to_next()
        facts = {"reason": error.reason.value, "message": error.message}
        if isinstance(error, REFUSALS):
            self._log.error(event, **facts, retry_in_seconds=self._refused_retry_seconds)
            await asyncio.sleep(self._refused_retry_seconds)
            return
        if self._num_failures == 0:
            self._log.warning(event, **facts, note="trying again until the router answers")
        await self._pause()

    async def _pause(self) -> None:
        await asyncio.sleep(backoff_seconds(self._num_failures, most=self._most_backoff_seconds))
        self._num_failures += 1


def _state_name(state: registry_pb2.ExpertState.ValueType) -> str:
    return registry_pb2.ExpertState.Name(state).removeprefix("EXPERT_STATE_").lower()
