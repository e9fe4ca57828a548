"""What a router at five times its capacity does to those it accepts and how it turns the others away.

python -m benchmarks.overload --runs 3

Real processes with tiny models: Redis, a router, two experts; the clients are a process of their own. First one client
alone (unloaded), then as many at a time as keep the p99 of token latency within twice the unloaded one: that many turns
are the capacity, and what they complete in a second is its rate. Then a router with `max_running_turns` = capacity
gets five times that rate, and nobody retries.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.overload_load import NUM_PROMPTS, Result
from benchmarks.processes import Processes, running_stack
from router_service.token_pace import percentile

SLOTS = ("math", "strings")
CANDIDATES = (2, 4, 8, 16)
MAX_SLOWDOWN = 2.0
REJECTED = {"QUEUE_FULL", "KV_MEMORY_FULL"}


@dataclass
class Round:
    """All requests of one run of the clients."""

    results: list[Result]
    cpu_share: float
    seconds: float

    @property
    def accepted(self) -> list[Result]:
        """Requests that were not turned away."""
        return [result for result in self.results if result.reason not in REJECTED]

    @property
    def rejected(self) -> list[Result]:
        """Requests that were turned away."""
        return [result for result in self.results if result.reason in REJECTED]

    @property
    def rate(self) -> float:
        """Completed requests per second."""
        return sum(result.is_complete for result in self.results) / self.seconds

    def token_ms(self, share: float) -> float:
        """A percentile of the time between two tokens, of all accepted requests."""
        return 1000 * percentile([s for r in self.accepted for s in r.token_seconds] or [0.0], share)

    def rejection_ms(self, share: float) -> float:
        """A percentile of the time from sending a request to its rejection."""
        return 1000 * percentile([r.refused_after_seconds or 0.0 for r in self.rejected] or [0.0], share)


async def clients(address: str, seconds: float, *options: str) -> Round:
    """One run of the clients, in their own process."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "benchmarks.overload_load", "--address", address, "--seconds", str(seconds), *options,
        stdout=asyncio.subprocess.PIPE,
    )  # fmt: skip
    async with asyncio.timeout(seconds + 180):
        output, _ = await process.communicate()
    assert process.returncode == 0, "the clients have failed"
    lines: list[dict[str, Any]] = [json.loads(line) for line in output.splitlines()]
    return Round([Result(**line) for line in lines[:-1]], lines[-1]["cpu_share"], seconds)


async def find_capacity(stack: Processes, seconds: float) -> tuple[int, float]:
    """The turns at a time that are the capacity, and its rate in requests per second."""
    await clients(stack.address, 1.0, "--concurrency", "1")  # warm-up
    unloaded = await clients(stack.address, seconds, "--concurrency", "1")
    print(
        f"  1 client alone: p99 {unloaded.token_ms(0.99):.1f} ms, {unloaded.rate:.1f} requests/s", flush=True
    )
    capacity, rate = 1, unloaded.rate
    for concurrency in CANDIDATES:
        tried = await clients(stack.address, seconds, "--concurrency", str(concurrency))
        print(
            f"  {concurrency} clients: p99 {tried.token_ms(0.99):.1f} ms, {tried.rate:.1f} requests/s",
            flush=True,
        )
        if tried.token_ms(0.99) > MAX_SLOWDOWN * unloaded.token_ms(0.99):
            break
        capacity, rate = concurrency, max(rate, tried.rate)
    return capacity, rate


def wrong_answers(known: dict[int, list[int]], results: list[Result]) -> int:
    """Accepted requests that broke off or brought other ids than the unloaded run."""
    return sum(not result.is_complete or result.ids != known[result.prompt] for result in results)


async def one_run(arguments: argparse.Namespace, folder: Path) -> dict[str, float]:
    """Capacity, then overload; the figures of the table."""
    capacity, rate = arguments.capacity, 0.0
    if not capacity:
        async with running_stack(folder, SLOTS) as stack:
            capacity, rate = await find_capacity(stack, arguments.seconds)
    options = ["--max-running-turns", str(capacity)]
    if arguments.max_token_seconds:
        options += ["--max-token-seconds", str(arguments.max_token_seconds)]
    async with running_stack(folder, SLOTS, router=options) as stack:
        await clients(stack.address, 1.0, "--concurrency", "1")
        before = await clients(stack.address, arguments.seconds, "--concurrency", "1")
        known = {result.prompt: result.ids for result in before.results}
        rate = rate or (await clients(stack.address, arguments.seconds, "--concurrency", str(capacity))).rate
        flood = await clients(
            stack.address, 2 * arguments.seconds, "--rate", str(arguments.times * rate), "--seed", "1"
        )
    assert len(known) == NUM_PROMPTS, "every prompt was asked once at least"
    return {
        "capacity, turns": capacity,
        "capacity, requests/s": rate,
        "offered, requests/s": len(flood.results) / flood.seconds,
        "unloaded p50 token ms": before.token_ms(0.5),
        "unloaded p99 token ms": before.token_ms(0.99),
        "overloaded p50 token ms": flood.token_ms(0.5),
        "overloaded p99 token ms": flood.token_ms(0.99),
        "p99 overloaded / unloaded": flood.token_ms(0.99) / before.token_ms(0.99),
        "accepted": len(flood.accepted),
        "accepted but wrong or broken off": wrong_answers(known, flood.accepted),
        "rejected": len(flood.rejected),
        "share rejected": len(flood.rejected) / len(flood.results),
        "rejections without a hint": sum(not r.retry_after_seconds for r in flood.rejected),
        "rejection p50 ms": flood.rejection_ms(0.5),
        "rejection p99 ms": flood.rejection_ms(0.99),
        "rejection max ms": flood.rejection_ms(1.0),
        "CPU share of the clients": flood.cpu_share,
    }


async def measure(arguments: argparse.Namespace) -> list[dict[str, float]]:
    """All runs."""
    with tempfile.TemporaryDirectory(prefix="overload-") as folder:
        return [await one_run(arguments, Path(folder)) for _ in range(arguments.runs)]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument(
        "--seconds", type=float, default=6.0, help="of each round of the clients; the flood has twice"
    )
    parser.add_argument("--times", type=float, default=5.0, help="offered load in capacities")
    parser.add_argument("--capacity", type=int, default=0, help="turns at a time; 0 = find it")
    parser.add_argument("--max-token-seconds", type=float, default=0.0, help="of the router; 0 = absent")
    runs = asyncio.run(measure(parser.parse_args()))
    print(f"\n{'':34}{'median':>10}  of " + ", ".join(f"run {number + 1}" for number in range(len(runs))))
    for name in runs[0]:
        values = [run[name] for run in runs]
        print(f"{name:34}{statistics.median(values):10.3f}  " + ", ".join(f"{value:.3f}" for value in values))


if __name__ == "__main__":
    main()
