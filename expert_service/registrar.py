"""Keeps the expert registered with a router's registry for as long as it serves.

register --lease--> heartbeat every third of it --LEASE_EXPIRED--> register ...
   |                    |
   | refused            | router gone: go on with backoff, the lease may outlive the gap
   v
say so, pause, register again (the router may serve another checkpoint by then)
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from types import TracebackType
from typing import Self

import grpc
import structlog

from fusionroute.errors import FusionRouteError, InternalFault, InvalidRequest, ModelRejected, Reason
from fusionroute.grpc_runtime import backoff_seconds, error_from_rpc
from fusionroute.v1 import common_pb2, registry_pb2, registry_pb2_grpc

log = structlog.get_logger(__name__)

CALL_TIMEOUT_SECONDS = 5.0
DEREGISTER_TIMEOUT_SECONDS = 2.0
REFUSALS = (ModelRejected, InvalidRequest, InternalFault)


@dataclass(frozen=True, slots=True)
class Registration:
    """What is registered.

    Attributes:
        instance_id: unique for each process.
        slot: of the router's checkpoint.
        address: host:port at which routers reach this expert.
        model: what it serves.
    """

    instance_id: str
    slot: str
    address: str
    model: common_pb2.ModelIdentity


class Registrar:
    """Registers and renews in a task of its own while its context lasts; deregisters at the end.

    Args:
        channel: to the router; the caller owns it.
        registration: what to register.
        load: how busy the expert is, for each heartbeat.
        refused_retry_seconds: pause after the router refused.
        most_backoff_seconds: longest pause while the router is not there.
    """

    def __init__(
        self,
        channel: grpc.aio.Channel,
        registration: Registration,
        load: Callable[[], common_pb2.Load],
        *,
        refused_retry_seconds: float = 30.0,
        most_backoff_seconds: float = 10.0,
    ) -> None:
        self._registry = registry_pb2_grpc.RegistryServiceStub(channel)
        self._registration = registration
        self._load = load
        self._refused_retry_seconds = refused_retry_seconds
        self._most_backoff_seconds = most_backoff_seconds
        self._log = log.bind(slot=registration.slot, instance=registration.instance_id)
        self._task: asyncio.Task[None] | None = None
        self._num_failures = 0

    async def __aenter__(self) -> Self:
        self._task = asyncio.create_task(self._run())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.leave()

    async def leave(self) -> None:
        """Stops renewing and leaves the registry; may be called twice, and without a router."""
        if self._task is None:
            return
        self._task.cancel()
        with suppress(asyncio.CancelledError):
            await self._task
        self._task = None
        request = registry_pb2.DeregisterExpertRequest(instance_id=self._registration.instance_id)
        try:
            await self._registry.DeregisterExpert(request, timeout=DEREGISTER_TIMEOUT_SECONDS)
            self._log.info("deregistered")
        except grpc.aio.AioRpcError as rpc_error:
            error = error_from_rpc(rpc_error)
            self._log.warning("deregister_failed", reason=error.reason.value, message=error.message)

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
        mine = self._registration
        request = registry_pb2.RegisterExpertRequest(
            instance_id=mine.instance_id, slot=mine.slot, address=mine.address, model=mine.model
        )
        while True:
            try:
                answer = await self._registry.RegisterExpert(request, timeout=CALL_TIMEOUT_SECONDS)
            except grpc.aio.AioRpcError as rpc_error:
                await self._endure(error_from_rpc(rpc_error), "register_failed")
            else:
                self._num_failures = 0
                self._log.info("registered", address=mine.address, lease_seconds=answer.lease_seconds)
                return float(answer.lease_seconds)

    async def _renew(self, lease_seconds: float) -> None:
        """Sends heartbeats until the registry says that the lease is gone."""
        state = registry_pb2.EXPERT_STATE_READY
        while True:
            await asyncio.sleep(lease_seconds / 3)
            request = registry_pb2.HeartbeatRequest(
                instance_id=self._registration.instance_id, load=self._load(), draining=False
            )
            try:
                answer = await self._registry.Heartbeat(request, timeout=CALL_TIMEOUT_SECONDS)
            except grpc.aio.AioRpcError as rpc_error:
                error = error_from_rpc(rpc_error)
                if error.reason is Reason.LEASE_EXPIRED:
                    self._log.warning("lease_expired", message=error.message)
                    return
                await self._endure(error, "heartbeat_failed")
                continue
            self._num_failures = 0
            lease_seconds = answer.lease_seconds or lease_seconds
            if answer.state != state:
                state = answer.state
                self._log.info("registry_state", state=registry_pb2.ExpertState.Name(state))

    async def _endure(self, error: FusionRouteError, event: str) -> None:
        """Says what is wrong, then pauses: long after a refusal, ever longer while the router is away."""
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
