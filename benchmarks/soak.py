"""Opens and abandons sessions worth ten times the key-value memory, and watches the memory of every process.

python -m benchmarks.soak --times 10

Then as many streams again are left by their clients in the middle. The slope of each process's memory over the second
half of the run is given with its 95 % confidence interval; at the end no key may be left in Redis once the sessions'
time to live is over.
"""

from __future__ import annotations

import argparse
import asyncio
import math
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import grpc
import psutil

from benchmarks.processes import Processes, running_stack
from fusionroute import private_redis
from fusionroute.grpc_runtime import channel
from fusionroute.v1 import router_pb2, router_pb2_grpc

SLOTS = ("math", "strings")
KV_TOKENS = 1024
SESSION_TTL_SECONDS = 5.0
SESSION_TOKENS = 64  # what an engine reserves at least
CLIENTS = 8
SAMPLE_SECONDS = 0.5


@dataclass
class Samples:
    """Resident memory of the processes over time; seconds and bytes."""

    times: list[float] = field(default_factory=list)
    resident: dict[str, list[float]] = field(default_factory=dict)


def slope(times: Sequence[float], values: Sequence[float]) -> tuple[float, float]:
    """Least-squares slope and half the width of its 95 % confidence interval, in units per second."""
    count = len(times)
    mean_time, mean_value = sum(times) / count, sum(values) / count
    spread = sum((t - mean_time) ** 2 for t in times)
    steepness = sum((t - mean_time) * (v - mean_value) for t, v in zip(times, values, strict=True)) / spread
    rest = sum(
        (v - mean_value - steepness * (t - mean_time)) ** 2 for t, v in zip(times, values, strict=True)
    )
    return steepness, 1.96 * math.sqrt(rest / max(1, count - 2) / spread)


@asynccontextmanager
async def sampled(stack: Processes) -> AsyncIterator[Samples]:
    """Samples within the context."""
    samples = Samples(resident={name: [] for name in stack.pids})
    processes = {name: psutil.Process(pid) for name, pid in stack.pids.items()}
    began = time.monotonic()

    async def watch() -> None:
        while True:
            samples.times.append(time.monotonic() - began)
            for name, process in processes.items():
                samples.resident[name].append(process.memory_info().rss)
            await asyncio.sleep(SAMPLE_SECONDS)

    task = asyncio.create_task(watch())
    try:
        yield samples
    finally:
        task.cancel()


def request(number: int, max_tokens: int) -> router_pb2.GenerateRequest:
    """A new session every time, of prompts that differ."""
    ids = [2 + (number * 7 + index * (1 + number % 5)) % 55 for index in range(12)]
    sampling = router_pb2.SamplingParameters(max_tokens=max_tokens, ignore_eos=True, seed=number)
    return router_pb2.GenerateRequest(token_ids=router_pb2.TokenIds(ids=ids), sampling=sampling)


async def use(
    stub: router_pb2_grpc.RouterServiceAsyncStub, count: int, *, max_tokens: int, leave_after: int | None
) -> int:
    """Opens `count` sessions and abandons them, if wanted in the middle of their stream; how many were served."""
    numbers, served = iter(range(count)), 0

    async def client() -> None:
        nonlocal served
        for number in numbers:
            call = stub.Generate(request(number, max_tokens), timeout=60)
            try:
                num_events = 0
                async for _ in call:
                    num_events += 1
                    if leave_after is not None and num_events > leave_after:
                        call.cancel()
                        break
                served += 1
            except grpc.aio.AioRpcError as error:
                if error.code() is not grpc.StatusCode.RESOURCE_EXHAUSTED:
                    raise
                await asyncio.sleep(0.1)

    await asyncio.gather(*(client() for _ in range(CLIENTS)))
    return served


async def keys_left(stack: Processes, patience_seconds: float) -> list[str]:
    """Keys in Redis once the sessions' time to live is over, those of the registry excepted."""
    async with private_redis.connect(stack.redis.url) as redis:
        left: list[str] = []
        for _ in range(int(patience_seconds)):
            left = [key.decode() if isinstance(key, bytes) else key for key in await redis.keys("*")]
            left = [key for key in left if "registry" not in key]
            if not left:
                break
            await asyncio.sleep(1.0)
        return left


async def soak(arguments: argparse.Namespace, folder: Path) -> None:
    """The whole run and its table."""
    count = arguments.times * KV_TOKENS // SESSION_TOKENS
    memory = ["--kv-tokens", str(KV_TOKENS)]
    ttl = ["--session-ttl-seconds", str(SESSION_TTL_SECONDS), "--alone-seconds", "0.5"]
    async with running_stack(folder, SLOTS, router=[*memory, *ttl], expert=memory) as stack:
        async with channel(stack.address) as open_channel:
            stub = router_pb2_grpc.RouterServiceStub(open_channel)
            await use(
                stub, 2 * KV_TOKENS // SESSION_TOKENS, max_tokens=20, leave_after=None
            )  # the caches are full
            async with sampled(stack) as samples:
                for leave_after in (None, arguments.leave_after):
                    began = time.monotonic()
                    served = await use(stub, count, max_tokens=20, leave_after=leave_after)
                    how = "abandoned when complete" if leave_after is None else "left in mid-stream"
                    print(
                        f"{served} of {count} sessions {how} in {time.monotonic() - began:.0f} s", flush=True
                    )
        report(samples)
        left = await keys_left(stack, arguments.patience_seconds)
        print(f"keys left in Redis after their time to live: {len(left)} {left[:5]}")


def report(samples: Samples) -> None:
    """The table of memory by process."""
    half = len(samples.times) // 2
    print(f"{'process':12}{'first MiB':>10}{'last MiB':>10}{'slope KiB/s, second half':>30}")
    for name, values in samples.resident.items():
        steepness, margin = slope(samples.times[half:], values[half:])
        print(
            f"{name:12}{values[0] / 2**20:10.1f}{values[-1] / 2**20:10.1f}"
            f"{steepness / 1024:18.2f} +- {margin / 1024:.2f}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--times", type=int, default=10, help="sessions' worth in key-value memories")
    parser.add_argument("--leave-after", type=int, default=4, help="events after which a client leaves")
    parser.add_argument("--patience-seconds", type=float, default=40.0, help="for keys to end")
    with tempfile.TemporaryDirectory(prefix="soak-") as folder:
        asyncio.run(soak(parser.parse_args(), Path(folder)))


if __name__ == "__main__":
    main()
