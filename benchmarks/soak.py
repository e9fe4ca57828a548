"""Opens and abandons sessions, and says by how many bytes each of them has made every process grow.

python -m benchmarks.soak --sessions 1500 --plot memory.png

Two ways of abandoning, one after the other: sessions that are never used again once their answer is complete, and
streams that their clients cancel in the middle. Each has a warm-up of its own, in which caches, pools and the tables
that have a limit fill. Then the resident memory of each process is read between blocks of sessions, after a moment of
quiet. Growth is the mean increment of the blocks; its 95 % interval is a bootstrap of runs of neighbouring increments,
since memory comes and goes in steps that outlast a block. Exit code 1 where growth is beyond `--limit-bytes`, or where
keys are left in Redis once the sessions' time to live is over.

What is left is a table with a limit: the router remembers which replica has a session cached, for 16,384 pairs of
session and slot, about 220 bytes each.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import random
import sys
import tempfile
import time
from collections.abc import Sequence
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
"""Sixteen sessions: memory is full from the beginning, as it is in a service that runs for days."""
SESSION_TTL_SECONDS = 5.0
ALONE_SECONDS = 0.05
QUIET_SECONDS = 0.3
CLIENTS = 8
MOST_SECONDS = 60.0
RUN_BLOCKS = 3
"""Neighbouring increments that are drawn together."""
NUM_DRAWS = 2000


@dataclass(frozen=True, slots=True)
class Way:
    """How sessions are abandoned.

    Attributes:
        max_tokens: of the answer.
        leave_after: events after which the client cancels; None = it reads the answer to its end.
    """

    name: str
    max_tokens: int
    leave_after: int | None


WAYS = (Way("complete", 4, None), Way("cancelled", 64, 2))


@dataclass(slots=True)
class Memory:
    """Resident bytes of each process between the blocks, the first value before the first block."""

    way: Way
    block: int
    resident: dict[str, list[int]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Growth:
    """Bytes per session, and the 95 % interval of that."""

    mean: float
    low: float
    high: float

    def verdict(self, limit_bytes: float) -> str:
        """In a word."""
        if self.mean > limit_bytes:
            return "GROWS"
        return "flat" if self.high <= limit_bytes else "not seen to grow"


def growth_of(values: Sequence[int], block: int, seed: int = 0) -> Growth:
    """Growth per session of memory that was read between blocks of sessions."""
    increments = [(after - before) / block for before, after in itertools.pairwise(values)]
    count, draw = len(increments), random.Random(seed)  # noqa: S311 - a bootstrap, not a secret
    run = min(RUN_BLOCKS, count)
    means: list[float] = []
    for _ in range(NUM_DRAWS):
        drawn: list[float] = []
        while len(drawn) < count:
            start = draw.randrange(count)
            drawn.extend(increments[(start + offset) % count] for offset in range(run))
        means.append(sum(drawn[:count]) / count)
    means.sort()
    low, high = means[int(0.025 * NUM_DRAWS)], means[int(0.975 * NUM_DRAWS)]
    return Growth(sum(increments) / count, low, high)


def request(number: int, max_tokens: int) -> router_pb2.GenerateRequest:
    """A new session every time, of prompts that differ."""
    ids = [2 + (number * 7 + index * (1 + number % 5)) % 55 for index in range(12)]
    sampling = router_pb2.SamplingParameters(max_tokens=max_tokens, ignore_eos=True, seed=number)
    return router_pb2.GenerateRequest(token_ids=router_pb2.TokenIds(ids=ids), sampling=sampling)


async def use(stub: router_pb2_grpc.RouterServiceAsyncStub, numbers: range, way: Way) -> None:
    """Opens sessions and abandons them. One that is refused for want of room is asked for again."""
    left = iter(numbers)

    async def client() -> None:
        for number in left:
            await until_served(stub, number, way)

    await asyncio.gather(*(client() for _ in range(CLIENTS)))


async def until_served(stub: router_pb2_grpc.RouterServiceAsyncStub, number: int, way: Way) -> None:
    """Asks again while there is no room."""
    async with asyncio.timeout(MOST_SECONDS):
        while not await was_served(stub, number, way):  # noqa: ASYNC110 - nobody tells when there is room
            await asyncio.sleep(0.05)


async def was_served(stub: router_pb2_grpc.RouterServiceAsyncStub, number: int, way: Way) -> bool:
    """Whether there was room for a session."""
    call = stub.Generate(request(number, way.max_tokens), timeout=MOST_SECONDS)
    num_events = 0
    try:
        async for _ in call:
            num_events += 1
            if way.leave_after is not None and num_events > way.leave_after:
                call.cancel()
                break
    except grpc.aio.AioRpcError as error:
        if error.code() is not grpc.StatusCode.RESOURCE_EXHAUSTED:
            raise
        return False
    return True


async def measured(
    stack: Processes, stub: router_pb2_grpc.RouterServiceAsyncStub, way: Way, arguments: argparse.Namespace
) -> Memory:
    """Memory over the sessions of one way, after its warm-up."""
    began = time.monotonic()
    await use(stub, range(arguments.warm_up), way)
    processes = {name: psutil.Process(pid) for name, pid in stack.pids.items()}
    processes["redis"] = psutil.Process(stack.redis.pid)
    memory = Memory(way, arguments.block, {name: [] for name in processes})
    for first in range(0, arguments.sessions + 1, arguments.block):
        await asyncio.sleep(QUIET_SECONDS)
        for name, process in processes.items():
            memory.resident[name].append(process.memory_info().rss)
        if first + arguments.block <= arguments.sessions:
            await use(stub, range(first, first + arguments.block), way)
    print(f"{way.name}: {arguments.sessions} sessions, {time.monotonic() - began:.0f} s", flush=True)
    return memory


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


async def soak(arguments: argparse.Namespace, folder: Path) -> bool:
    """The whole run and its table; whether nothing has grown."""
    room = ["--kv-tokens", str(KV_TOKENS)]
    router = ["--session-ttl-seconds", str(SESSION_TTL_SECONDS), "--alone-seconds", str(ALONE_SECONDS)]
    async with running_stack(folder, SLOTS, router=[*room, *router], expert=room) as stack:
        async with channel(stack.address) as open_channel:
            stub = router_pb2_grpc.RouterServiceStub(open_channel)
            memories = [await measured(stack, stub, way, arguments) for way in WAYS]
        is_flat = report(memories, arguments.limit_bytes)
        left = await keys_left(stack, arguments.patience_seconds)
        print(f"keys left in Redis after their time to live: {len(left)} {left[:5]}")
    if arguments.plot is not None:
        plot(memories, arguments.plot)
    return is_flat and not left


def report(memories: Sequence[Memory], limit_bytes: float) -> bool:
    """The table; whether nothing in it has grown."""
    is_flat = True
    print(f"{'sessions':12}{'process':10}{'first MiB':>10}{'last MiB':>10}{'bytes per session [95 %]':>34}")
    for memory in memories:
        for name, values in memory.resident.items():
            growth = growth_of(values, memory.block)
            verdict = growth.verdict(limit_bytes)
            is_flat = is_flat and growth.mean <= limit_bytes
            interval = f"{growth.mean:.0f} [{growth.low:.0f}, {growth.high:.0f}]"
            first, last = values[0] / 2**20, values[-1] / 2**20
            print(f"{memory.way.name:12}{name:10}{first:10.1f}{last:10.1f}{interval:>34}  {verdict}")
    return is_flat


def plot(memories: Sequence[Memory], path: Path) -> None:
    """Draws what was read, each process from its own first value."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(memories), figsize=(10, 4), sharey=True, layout="constrained")
    for axis, memory in zip(axes, memories, strict=True):
        for name, values in memory.resident.items():
            sessions = [index * memory.block for index in range(len(values))]
            axis.plot(sessions, [(value - values[0]) / 2**20 for value in values], label=name, marker=".")
        axis.set(title=f"sessions {memory.way.name}", xlabel="sessions since the warm-up")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("resident memory gained, MiB")
    axes[0].legend()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--sessions", type=int, default=1500, help="of each way, after the warm-up")
    parser.add_argument("--warm-up", type=int, default=2000, help="sessions of each way that do not count")
    parser.add_argument("--block", type=int, default=100, help="sessions between two looks at the memory")
    parser.add_argument(
        "--limit-bytes", type=float, default=1024.0, help="growth per session that is let pass"
    )
    parser.add_argument("--patience-seconds", type=float, default=40.0, help="for keys to end")
    parser.add_argument("--plot", type=Path, help="draws the memory into this PNG")
    with tempfile.TemporaryDirectory(prefix="soak-") as folder:
        is_flat = asyncio.run(soak(parser.parse_args(), Path(folder)))
    sys.exit(0 if is_flat else 1)


if __name__ == "__main__":
    main()
