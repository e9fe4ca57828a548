"""The registry of a router as an operator's command uses it: typed calls, our errors."""

from __future__ import annotations

from collections.abc import AsyncIterator, Collection, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import grpc

from fusionroute.access import ClientAccess
from fusionroute.calls import answer_of
from fusionroute.errors import Unavailable
from fusionroute.grpc_runtime import channel
from fusionroute.v1 import registry_pb2, registry_pb2_grpc
from fusionroute.v1.registry_pb2 import DrainPolicy, ListExpertsResponse

CALL_TIMEOUT_SECONDS = 5.0


class RegistryClient:
    """Connections to the routers of one registry. All methods raise FusionRouteError as the registry meant it.

    Every call may be repeated, so one that a router does not answer goes to the next.
    """

    def __init__(self, routers: Sequence[tuple[str, grpc.aio.Channel]]) -> None:
        self._routers = [
            (address, registry_pb2_grpc.RegistryServiceStub(connection)) for address, connection in routers
        ]

    @classmethod
    @asynccontextmanager
    async def open(cls, address: str, access: ClientAccess | None = None) -> AsyncIterator[RegistryClient]:
        """A client for the router at host:port, or several with commas between them, within the block."""
        async with AsyncExitStack() as stack:
            yield cls(
                [
                    (each, await stack.enter_async_context(channel(each, access=access)))
                    for each in address.split(",")
                ]
            )

    async def list(self) -> ListExpertsResponse:
        """The living entries and the revision."""
        answer: ListExpertsResponse = await self._ask("ListExperts", registry_pb2.ListExpertsRequest())
        return answer

    async def drain(
        self, instance_id: str, expected_revision: int, policy: DrainPolicy.ValueType
    ) -> registry_pb2.DrainExpertResponse:
        """Lets an instance be asked no longer than the policy says."""
        request = registry_pb2.DrainExpertRequest(
            instance_id=instance_id, expected_revision=expected_revision, policy=policy
        )
        answer: registry_pb2.DrainExpertResponse = await self._ask("DrainExpert", request)
        return answer

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
        answer: registry_pb2.SwapExpertsResponse = await self._ask("SwapExperts", request)
        return answer

    async def roll_back(
        self, slot: str, expected_revision: int, policy: DrainPolicy.ValueType
    ) -> registry_pb2.RollbackSwapResponse:
        """Lets those serve again that the slot's latest swap has retired."""
        request = registry_pb2.RollbackSwapRequest(
            slot=slot, expected_revision=expected_revision, policy=policy
        )
        answer: registry_pb2.RollbackSwapResponse = await self._ask("RollbackSwap", request)
        return answer

    async def _ask(self, method: str, request: object) -> Any:
        for _ in self._routers[1:]:
            try:
                return await self._ask_first(method, request)
            except Unavailable:
                self._routers.append(self._routers.pop(0))
        return await self._ask_first(method, request)

    async def _ask_first(self, method: str, request: object) -> Any:
        address, registry = self._routers[0]
        return await answer_of(getattr(registry, method)(request, timeout=CALL_TIMEOUT_SECONDS), address)
