"""The stack that is hurt: one Redis, several routers, experts in three slots, each behind links of its own."""

from __future__ import annotations

import asyncio
import signal
import sys
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import grpc
from redis.asyncio import Redis

from expert_service.settings import ExpertSettings
from fusionroute import private_redis
from fusionroute.client import RouterClient
from fusionroute.errors import FusionRouteError
from fusionroute.grpc_runtime import channel
from fusionroute.v1 import expert_pb2, expert_pb2_grpc
from fusionroute.v1.registry_pb2 import EXPERT_STATE_READY
from tests.chaos.link import Link
from tests.chaos.nursery import Nursery
from tests.chaos.spawning import Running, exec_tied
from tests.chaos.supervisor import Supervised
from tests.served_stack import Family

CALL_SECONDS = 5.0


@dataclass(frozen=True, slots=True)
class StackSettings:
    """How the stack is made.

    Attributes:
        replicas: experts by slot.
        base_delay_seconds: on the way between routers and experts, each direction, so that generations last.
        start_seconds: for all processes to be there.
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
    last_missing: str = ""
    """What `restore` waits for."""

    @property
    def nodes(self) -> list[Node]:
        """All processes."""
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


@asynccontextmanager
async def running_stack(family: Family, folder: Path, settings: StackSettings) -> AsyncIterator[ChaosStack]:
    """The stack, ready, within the context; nothing of it is left afterwards, unless the processes are at fault."""
    async with AsyncExitStack() as stack:
        nursery = await stack.enter_async_context(Nursery()) if settings.forks else None
        builder = _Builder(family, folder, settings, stack, nursery)
        redis = await builder.redis()
        routers = [await builder.router(index, redis) for index in range(settings.num_routers)]
        experts = [
            await builder.expert(slot, index, routers)
            for slot, count in settings.replicas.items()
            for index in range(count)
        ]
        running = ChaosStack(settings, redis, routers, experts, builder.redis_socket, builder.redis_data)
        stack.push_async_callback(_close_all, running)
        redis.process.start()
        await redis.process.until_ready(settings.start_seconds)
        for node in (*routers, *experts):
            node.process.start()
        try:
            await running.restore(settings.start_seconds)
        except TimeoutError as error:
            raise TimeoutError(f"the stack did not start: {running.last_missing or error}") from error
        yield running


async def _close_all(stack: ChaosStack) -> None:
    await asyncio.gather(*(node.process.close() for node in (*stack.experts, *stack.routers)))
    await stack.redis.process.close()


class _Builder:
    def __init__(
        self,
        family: Family,
        folder: Path,
        settings: StackSettings,
        stack: AsyncExitStack,
        nursery: Nursery | None,
    ) -> None:
        self._family, self._folder, self._settings, self._stack = family, folder, settings, stack
        self._nursery = nursery
        self.redis_socket = folder / "redis.sock"
        self.redis_data = folder / "redis"
        self.redis_data.mkdir(parents=True)

    async def redis(self) -> Node:
        command = private_redis.server_command(
            private_redis.find_redis_server(), self.redis_socket, self.redis_data
        )
        log = self._folder / "redis.log"
        process = Supervised(
            "redis",
            partial(_execute, command, {}, log),
            log,
            ready=lambda: str(self.redis_socket) if self.redis_socket.exists() else None,
            forget_ready=lambda: self.redis_socket.unlink(missing_ok=True),
        )
        return Node(process, await self._link("redis", process), [])

    async def router(self, index: int, redis: Node) -> Node:
        name = f"router-{index + 1}"
        to_redis = await self._link(f"{name}>redis", redis.process)
        settings = self._settings
        options = {
            "checkpoint": str(self._family.router),
            "session-lease-seconds": str(settings.session_lease_seconds),
            "expert-lease-seconds": str(settings.expert_lease_seconds),
            "alone-seconds": str(settings.alone_seconds),
            **settings.router_options,
        }
        process = self._daemon(name, "router_service", options, REDIS_URL=f"redis://{to_redis.address}/0")
        redis.others.append(to_redis)
        return Node(process, await self._link(f"client>{name}", process), [to_redis])

    async def expert(self, slot: str, index: int, routers: list[Node]) -> Node:
        name = f"expert-{slot}-{index + 1}"
        registries = [await self._link(f"{name}>{r.process.name}", r.process) for r in routers]
        for router, link in zip(routers, registries, strict=True):
            router.others.append(link)
        front = await self._link(name, base_delay_seconds=self._settings.base_delay_seconds)
        options = {
            "model": str(self._family.experts[slot]),
            "slot": slot,
            "router": _router_option(slot, [link.address for link in registries]),
            "advertise": front.address,
        }
        process = self._daemon(name, "expert_service", options)
        front.target = lambda: process.address
        return Node(process, front, registries, slot)

    def _daemon(self, name: str, module: str, options: Mapping[str, str], **environment: str) -> Supervised:
        ready_file = self._folder / f"{name}.ready"
        all_options = {
            "port": "0",
            "threads": "1",
            "drain-seconds": "1",
            "log-format": "json",
            "ready-file": str(ready_file),
            **options,
        }
        arguments = [part for option, value in all_options.items() for part in (f"--{option}", value)]
        environment |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        log = self._folder / f"{name}.log"
        if self._nursery is None:
            spawn = partial(_execute, [sys.executable, "-m", module, *arguments], environment, log)
        else:
            spawn = partial(self._nursery.spawn, module, arguments, environment, log)

        def ready() -> str | None:
            try:
                return ready_file.read_text().strip() or None
            except FileNotFoundError:
                return None

        return Supervised(
            name, spawn, log, ready=ready, forget_ready=lambda: ready_file.unlink(missing_ok=True)
        )

    async def _link(
        self, name: str, process: Supervised | None = None, base_delay_seconds: float = 0.0
    ) -> Link:
        link = Link(name, lambda: None if process is None else process.address, base_delay_seconds)
        return await self._stack.enter_async_context(link)


async def _execute(command: Sequence[str], environment: Mapping[str, str], log: Path) -> Running:
    with log.open("ab") as output:
        return await exec_tied(command, environment, stdout=output, stderr=output)


def _router_option(slot: str, addresses: list[str]) -> str:
    """All routers if the expert can register with several, the first otherwise."""
    every = ",".join(addresses)
    try:
        ExpertSettings.model_validate({"model": "x", "slot": slot, "router": every})
    except ValueError:
        return addresses[0]
    return every
