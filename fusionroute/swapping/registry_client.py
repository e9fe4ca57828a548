"""The registry of a router as an operator's command uses it: typed calls, our errors."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Collection
from contextlib import asynccontextmanager
from typing import TypeVar

import grpc

from fusionroute.access import ClientAccess
from fusionroute.calls import answer_of
from fusionroute.grpc_runtime import channel
from fusionroute.v1 import registry_pb2, registry_pb2_grpc
from fusionroute.v1.registry_pb2 import DrainPolicy, ListExpertsResponse

CALL_TIMEOUT_SECONDS = 5.0

Answer = TypeVar("Answer")


class RegistryClient:
    """One connection to a registry. All methods raise FusionRouteError as the registry meant it."""

    def __init__(self, connection: grpc.aio.Channel, address: str) -> None:
        self.address = address
        self._registry = registry_pb2_grpc.RegistryServiceStub(connection)

    @classmethod
    @asynccontextmanager
    async def open(cls, address: str, access: ClientAccess | None = None) -> AsyncIterator[RegistryClient]:
        """A client for the router at host:port, for as long as the block lasts."""
        async with channel(address, access=access) as connection:
            yield cls(connection, address)

    async def list(self) -> ListExpertsResponse:
        """The living entries and the revision."""
        return await self._ask(self._registry.ListExperts, registry_pb2.ListExpertsRequest())

    async def drain(
        self, instance_id: str, expected_revision: int, policy: DrainPolicy.ValueType
    ) -> registry_pb2.DrainExpertResponse:
        """Lets an instance be asked no longer than the policy says."""
        request = registry_pb2.DrainExpertRequest(
            instance_id=instance_id, expected_revision=expected_revision, policy=policy
        )
        return await self._ask(self._registry.DrainExpert, request)

    async def swap(
        self,
        slot: str,
        instance_ids: Collection[str],
        expected_revision: int,
        policy: DrainPolicy.ValueType,
    ) -> registry_pb2.SwapExpertsResponse:
        """Lets these instances serve the slot; the others drain."""
        request = registry_pb2.SwapExpertsRequest(
            slot=slot, instance_ids=instance_ids, expected_revision=expected_revision, policy=policy
        )
        return await self._ask(self._registry.SwapExperts, request)

    async def roll_back(
        self, slot: str, expected_revision: int, policy: DrainPolicy.ValueType
    ) -> registry_pb2.RollbackSwapResponse:
        """Lets those serve again that the slot's latest swap has retired."""
        request = registry_pb2.RollbackSwapRequest(
            slot=slot, expected_revision=expected_revision, policy=policy
        )
        return await self._ask(self._registry.RollbackSwap, request)

    async def _ask(self, call: Callable[..., Awaitable[Answer]], request: object) -> Answer:
        return await answer_of(call(request, timeout=CALL_TIMEOUT_SECONDS), self.address)
