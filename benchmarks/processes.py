"""Real processes to measure: a Redis, a router and an expert for each slot, with tiny models and logs in files."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

from fusionroute.grpc_runtime import channel
from fusionroute.private_redis import PrivateRedis
from fusionroute.v1 import registry_pb2, registry_pb2_grpc
from tests.served_stack import make_family

START_SECONDS = 90.0
STOP_SECONDS = 20.0
POLL_SECONDS = 0.1


@dataclass
class Processes:
    """What runs.

    Attributes:
        address: of the router.
        pids: by name, `router` and the slots.
    """

    redis: PrivateRedis
    folder: Path
    address: str = ""
    pids: dict[str, int] = field(default_factory=dict)


@asynccontextmanager
async def running_stack(
    folder: Path, slots: Sequence[str], *, router: Sequence[str] = (), expert: Sequence[str] = ()
) -> AsyncIterator[Processes]:
    """A stack within the context.

    Args:
        folder: for models, logs and sockets; models are made where they are missing.
        router: further options of the router.
        expert: further options of each expert.
    """
    models = folder / "models"
    if not models.exists():
        await asyncio.to_thread(make_family, models, tuple(slots))
    async with AsyncExitStack() as stack:
        redis = await stack.enter_async_context(PrivateRedis())
        running = Processes(redis, folder)
        running.address = await _start(
            stack, running, "router", "router_service",
            ["--checkpoint", str(models / "router"), "--redis-url", redis.url, *router],
        )  # fmt: skip
        for slot in slots:
            await _start(
                stack, running, slot, "expert_service",
                ["--model", str(models / slot), "--slot", slot, "--router", running.address, *expert],
            )  # fmt: skip
        await _until_registered(running.address, len(slots))
        yield running


async def _start(
    stack: AsyncExitStack, running: Processes, name: str, module: str, options: Sequence[str]
) -> str:
    """Starts a service; returns its address."""
    ready_file = running.folder / f"{name}-ready"
    ready_file.unlink(missing_ok=True)
    log = stack.enter_context((running.folder / f"{name}.log").open("wb"))
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", module, "--port", "0", "--threads", "1", "--log-level", "warning",
        "--ready-file", str(ready_file), *options,
        env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=log, stderr=log,
    )  # fmt: skip
    stack.push_async_callback(_stop, process)
    running.pids[name] = process.pid
    async with asyncio.timeout(START_SECONDS):
        while not ready_file.exists():
            if process.returncode is not None:
                raise RuntimeError(
                    f"{name} has ended: {(running.folder / f'{name}.log').read_text()[-2000:]}"
                )
            await asyncio.sleep(0.05)
    return ready_file.read_text().strip()


async def _stop(process: asyncio.subprocess.Process) -> None:
    if process.returncode is None:
        process.terminate()
        try:
            async with asyncio.timeout(STOP_SECONDS):
                await process.wait()
        except TimeoutError:
            process.kill()
            await process.wait()


async def _until_registered(address: str, num_experts: int) -> None:
    request = registry_pb2.ListExpertsRequest()
    async with channel(address) as open_channel, asyncio.timeout(START_SECONDS):
        stub = registry_pb2_grpc.RegistryServiceStub(open_channel)
        for _ in range(int(START_SECONDS / POLL_SECONDS)):
            if len((await stub.ListExperts(request, timeout=5)).experts) >= num_experts:
                return
            await asyncio.sleep(POLL_SECONDS)
        raise TimeoutError("the experts have not registered")
