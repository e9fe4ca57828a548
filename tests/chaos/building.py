"""Puts the stack together: processes, links between them, and the certainty that all of it ends."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from pathlib import Path

from expert_service.settings import ExpertSettings
from fusionroute import private_redis
from tests.chaos.link import Link
from tests.chaos.nursery import Nursery
from tests.chaos.spawning import Running, exec_tied
from tests.chaos.stack import ChaosStack, Node, StackSettings
from tests.chaos.supervisor import Supervised
from tests.served_stack import Family


@asynccontextmanager
async def running_stack(family: Family, folder: Path, settings: StackSettings) -> AsyncIterator[ChaosStack]:
    """The stack, ready, within the context; nothing of it is left afterwards, unless the processes are at fault."""
    async with AsyncExitStack() as stack:
        nursery = await stack.enter_async_context(Nursery()) if settings.forks else None
        builder = _Builder(family, folder, settings, stack, nursery)
        redis = await builder.redis()
        routers = [await builder.router(index, redis) for index in range(settings.num_routers)]
        experts = [
            await builder.expert(slot, index + 1, routers)
            for slot, count in settings.replicas.items()
            for index in range(count)
        ]

        async def another_expert(slot: str, model: str, number: int) -> Node:
            return await builder.expert(slot, number, routers, model=model, flags=("--standby",))

        running = ChaosStack(
            settings, redis, routers, experts, builder.redis_socket, builder.redis_data, another_expert
        )
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
    daemons = (*stack.experts, *stack.retired, *stack.routers)
    await asyncio.gather(*(node.process.close() for node in daemons))
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
            "expert-timeout-seconds": str(settings.expert_timeout_seconds),
            **settings.router_options,
        }
        process = self._daemon(name, "router_service", options, REDIS_URL=f"redis://{to_redis.address}/0")
        redis.others.append(to_redis)
        return Node(process, await self._link(f"client>{name}", process), [to_redis])

    async def expert(
        self, slot: str, number: int, routers: list[Node], *, model: str = "", flags: Sequence[str] = ()
    ) -> Node:
        name = f"expert-{slot}-{number}"
        registries = [await self._link(f"{name}>{r.process.name}", r.process) for r in routers]
        for router, link in zip(routers, registries, strict=True):
            router.others.append(link)
        front = await self._link(name, base_delay_seconds=self._settings.base_delay_seconds)
        options = {
            "model": model or str(self._family.experts[slot]),
            "slot": slot,
            "router": _router_option(slot, [link.address for link in registries]),
            "advertise": front.address,
        }
        process = self._daemon(name, "expert_service", options, flags)
        front.target = lambda: process.address
        return Node(process, front, registries, slot)

    def _daemon(
        self,
        name: str,
        module: str,
        options: Mapping[str, str],
        flags: Sequence[str] = (),
        **environment: str,
    ) -> Supervised:
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
        arguments += flags
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
