"""The stack that is hurt: one Redis, several routers, experts in three slots, each behind links of its own."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import grpc
from redis.asyncio import Redis

from fusionroute import private_redis
from fusionroute.client import RouterClient
from fusionroute.errors import FusionRouteError
from fusionroute.grpc_runtime import channel
from fusionroute.v1 import expert_pb2, expert_pb2_grpc
from fusionroute.v1.registry_pb2 import EXPERT_STATE_READY
from tests.chaos.link import Link
from tests.chaos.supervisor import Supervised

CALL_SECONDS = 5.0


@dataclass(frozen=True, slots=True)
class StackSettings:
    """How the stack is made.

    Attributes:
        replicas: experts by slot.
        base_delay_seconds: on the way between routers and experts, each direction, so that generations last.
        start_seconds: for all processes to be there.
        expert_timeout_seconds: longer than a daemon takes to start on a machine that has much else to do.
        forks: whether daemons are forked from one that has imported everything, which saves seconds of each start.
    """

    replicas: Mapping[str, int] = field(default_factory=lambda: {"math": 2, "strings": 1, "format": 1})
    num_routers: int = 2
    session_lease_seconds: float = 5.0
    expert_lease_seconds: float = 5.0
    alone_seconds: float = 3.0
    base_delay_seconds: float = 0.02
    start_seconds: float = 120.0
    forks: bool = False
    expert_timeout_seconds: float = 150.0
    router_options: Mapping[str, str] = field(default_factory=dict)


@dataclass(slots=True, eq=False)
class Node:
    """A process and every link that leads to or from it."""

    process: Supervised
    front: Link
    """Through which it is asked."""
    others: list[Link]
    """To Redis, to registries."""
    slot: str = ""

    @property
    def links(self) -> list[Link]:
        """All of them."""
        return [self.front, *self.others]


@dataclass(slots=True, eq=False)
class ChaosStack:
    """What runs."""

    settings: StackSettings
    redis: Node
    routers: list[Node]
    experts: list[Node]
    redis_socket: Path
    redis_data: Path
    another_expert: Callable[[str, str, int], Awaitable[Node]]
    """A further expert on standby, not started yet: slot, model, number of its name."""
    retired: list[Node] = field(default_factory=list)
    """Experts that were stopped."""
    last_missing: str = ""
    """What `restore` waits for."""

    @property
    def nodes(self) -> list[Node]:
        """All processes that shall run."""
        return [self.redis, *self.routers, *self.experts]

    @asynccontextmanager
    async def store(self) -> AsyncIterator[Redis]:
        """A client of Redis that goes around the links."""
        client = private_redis.connect(private_redis.url_of(self.redis_socket))
        try:
            yield client
        finally:
            await client.aclose()

    async def restore(self, timeout_seconds: float) -> None:
        """Returns when all is as it was: processes there, every expert ready in the eyes of every router."""
        for node in self.nodes:
            node.process.signal(signal.SIGCONT)
            for link in node.links:
                link.heal()
        async with asyncio.timeout(timeout_seconds):
            for node in self.nodes:
                self.last_missing = f"{node.process.name} does not serve, see {node.process.log}"
                await node.process.until_ready(timeout_seconds)
            while (missing := await self.missing()) is not None:
                self.last_missing = missing
                await asyncio.sleep(0.1)

    async def missing(self) -> str | None:
        """What a router still lacks; None when all is there."""
        wanted = sorted(node.front.address for node in self.experts)
        for router in self.routers:
            if (address := router.process.address) is None:
                return f"{router.process.name} does not serve"
            try:
                async with RouterClient.open(address) as client:
                    entries = await client.list_experts(2.0)
                    info = await client.info(2.0)
            except FusionRouteError as error:
                return f"{router.process.name}: {error}"
            ready = sorted(entry.address for entry in entries if entry.state == EXPERT_STATE_READY)
            if ready != wanted:
                return f"{router.process.name} knows {ready} instead of {wanted}"
            if not all(slot.ready for slot in info.slots):
                return f"{router.process.name} is not ready for all slots"
        return None

    async def sessions(self, expert: Node) -> list[expert_pb2.SessionInfo]:
        """What an expert has cached; empty when it does not answer."""
        address = expert.process.address
        if address is None:
            return []
        async with channel(address) as connection:
            stub = expert_pb2_grpc.ExpertServiceStub(connection)
            with suppress(grpc.aio.AioRpcError):
                request = expert_pb2.ListSessionsRequest(limit=1000)
                return list((await stub.ListSessions(request, timeout=CALL_SECONDS)).sessions)
        return []

    async def close_session(self, expert: Node, session: expert_pb2.SessionInfo) -> bool:
        """Asks an expert to forget a session, under the fence that it has seen."""
        address = expert.process.address
        assert address is not None
        async with channel(address) as connection:
            stub = expert_pb2_grpc.ExpertServiceStub(connection)
            request = expert_pb2.CloseSessionRequest(session_id=session.session_id, fence=session.fence)
            return bool((await stub.CloseSession(request, timeout=CALL_SECONDS)).existed)
