"""What one logits row costs on its way from expert to router: by call, by stream, by shared memory, as short reply.

    python benchmarks/wire.py [--width 128256] [--dtype bfloat16] [--rounds 300]

Two processes on loopback. The expert's engine has its row at hand, so that what is measured is the way alone: from
the router's `Instance.step` to rows that can be fused. The ways take turns, so that they share the machine's noise.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import cast

import psutil
import torch

from expert_service.bootstrap import service_of
from expert_service.served_model import ServedModel
from expert_service.servicer import ExpertServicer
from fusionroute.engine import Engine, EngineLoad, ModelFacts, StepCall, StepOutcome
from fusionroute.grpc_runtime import channel, server
from fusionroute.telemetry import configure_logs
from fusionroute.v1 import common_pb2, expert_pb2_grpc, registry_pb2
from fusionroute.wire import matrix_to_numpy
from router_service.instances import Instance, step_request

NUM_WARMUPS = 30
DEADLINE_SECONDS = 10.0


class ReadyEngine:
    """Has the row of every step at hand."""

    def __init__(self, width: int, dtype: str) -> None:
        self.facts = ModelFacts("ready", "w", "t", width, "none", dtype, 1 << 20, 1)
        self._rows = torch.randn(1, width, generator=torch.Generator().manual_seed(1)).to(
            getattr(torch, dtype)
        )

    def submit(self, call: StepCall) -> asyncio.Future[StepOutcome]:
        future = asyncio.get_running_loop().create_future()
        future.set_result(StepOutcome(self._rows, None, call.end_position, 1, 0.0, 0.0, 1, 1))
        return future

    def load(self) -> EngineLoad:
        return EngineLoad(1, 0, 1, 0, 1, 0, 0)


async def serve(width: int, dtype: str) -> None:
    """Serves until stdin ends."""
    servicer = ExpertServicer(ServedModel(cast(Engine, ReadyEngine(width, dtype))))
    async with server([service_of(servicer)]) as running:
        print(running.address, flush=True)
        await asyncio.to_thread(sys.stdin.read)


@asynccontextmanager
async def connected(address: str, width: int, memory_bytes: int) -> AsyncIterator[Instance]:
    """The expert as a router sees it."""
    model = common_pb2.ModelIdentity(logits_width=width, epoch=1)
    entry = registry_pb2.ExpertEntry(instance_id="i", address=address, model=model)
    opened = channel(address)
    stub = expert_pb2_grpc.ExpertServiceStub(opened)
    instance = Instance(entry, opened, stub, memory_bytes=memory_bytes)
    yield instance
    await instance.close()


class Way:
    """One way of asking; what it took in each round."""

    def __init__(self, name: str, instance: Instance, expert: psutil.Process, top_logits: int = 0) -> None:
        self.name, self._instance, self._expert, self._top_logits = name, instance, expert, top_logits
        self._width = instance.entry.model.logits_width
        self.num_bytes = 0  # of an answer
        self.wall_ms: list[float] = []
        self.router_ms: list[float] = []
        self.expert_ms: list[float] = []

    async def ask(self, call: StepCall) -> None:
        deadline = time.monotonic() + DEADLINE_SECONDS
        request = step_request(call, 0)
        if not self._instance.has_streams:
            response = await self._instance.stub.Step(request, timeout=DEADLINE_SECONDS)
            assert matrix_to_numpy(response.rows, self._width)[0, 0] != 0.0
        elif self._top_logits:
            request.top_logits = self._top_logits
            reply = await self._instance.line.step(request, deadline)
            response = reply.response
        else:
            reply = await self._instance.line.step(request, deadline, 4 * self._width)
            assert reply.rows(self._width)[0, 0] != 0.0
            response = reply.response
        data = reply.data if self._instance.has_streams else None
        self.num_bytes = response.ByteSize() + (0 if data is None else data.nbytes)

    async def measure(self, calls: list[StepCall]) -> None:
        expert_before, router_before = self._expert.cpu_times(), time.process_time()
        for call in calls:
            began = time.perf_counter()
            await self.ask(call)
            self.wall_ms.append((time.perf_counter() - began) * 1e3)
        expert_after = self._expert.cpu_times()
        used = expert_after.user + expert_after.system - expert_before.user - expert_before.system
        self.expert_ms.append(used * 1e3 / len(calls))
        self.router_ms.append((time.process_time() - router_before) * 1e3 / len(calls))


async def measure(address: str, expert: psutil.Process, arguments: argparse.Namespace) -> None:
    """Prints a line for each way."""
    width = arguments.width
    call = StepCall("s", 1000, [7], 1)
    async with AsyncExitStack() as stack:

        async def to(memory_bytes: int) -> Instance:
            return await stack.enter_async_context(connected(address, width, memory_bytes))

        unary = await to(0)
        unary.has_streams = False
        ways = [
            Way("unary", unary, expert),
            Way("stream", await to(0), expert),
            Way("stream, shared memory", await to(32 * 2**20), expert),
            Way("stream, 64 highest logits", await to(0), expert, top_logits=64),
        ]
        for way in ways:
            for _ in range(NUM_WARMUPS):
                await way.ask(call)
                await asyncio.sleep(0.002)
        for _ in range(arguments.rounds // 20):
            for way in ways:
                await way.measure([call] * 20)
        print(
            f"width {width}, {arguments.dtype}, {len(ways[0].wall_ms)} steps each, load {os.getloadavg()[0]:.1f}"
        )
        print(
            f"{'way':28}{'median ms':>10}{'p90 ms':>8}{'router CPU ms':>15}{'expert CPU ms':>15}{'bytes':>9}"
        )
        for way in ways:
            wall = sorted(way.wall_ms)
            print(
                f"{way.name:28}{statistics.median(wall):10.3f}{wall[len(wall) * 9 // 10]:8.3f}"
                f"{statistics.median(way.router_ms):15.3f}{statistics.mean(way.expert_ms):15.3f}"
                f"{way.num_bytes:9}"
            )


def main() -> None:
    """Measures, or serves for a measurement."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--width", type=int, default=128_256)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16")
    parser.add_argument("--rounds", type=int, default=300)
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    configure_logs("wire", log_level="error")
    if arguments.serve:
        asyncio.run(serve(arguments.width, arguments.dtype))
        return
    command = [
        sys.executable,
        __file__,
        "--serve",
        "--width",
        str(arguments.width),
        "--dtype",
        arguments.dtype,
    ]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdin is not None
        address = process.stdout.readline().strip()
        try:
            asyncio.run(measure(address, psutil.Process(process.pid), arguments))
        finally:
            process.stdin.close()


if __name__ == "__main__":
    main()
