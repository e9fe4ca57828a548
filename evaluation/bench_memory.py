"""What a session costs in memory: bytes by which router and expert grow, beside those of its keys and values."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import fmean

import psutil

from evaluation.bench_machine import kv_bytes_per_token, machine, sizes
from evaluation.bench_report import Bars, Cell, Finding, Report, Table
from evaluation.bench_runs import OnRun, Spread
from evaluation.bench_served import ServedStack, request_for

SESSIONS_PER_BLOCK = 16
CLIENTS = 4
QUIET_SECONDS = 1.0
NUM_WARMUPS = 2
NEW_TOKENS = 8
MOST_BYTES_PER_KV_BYTE = 1.10
MOST_SHARED = 0.2
ITEMSIZE = {"float32": 4, "float16": 2, "bfloat16": 2}

Prompts = Callable[[int, int], Sequence[int]]
"""The prompt of a number with so many tokens; prompts of different numbers share no beginning."""


@dataclass(frozen=True, slots=True)
class Kind:
    """How sessions come to their length.

    Attributes:
        prompt_tokens: of the prompt, of which the first `shared_tokens` are the same in all sessions of the kind.
        new_tokens: written after it.
    """

    name: str
    prompt_tokens: int
    new_tokens: int = NEW_TOKENS
    shared_tokens: int = 0

    @property
    def cached_tokens(self) -> int:
        """Keys and values that a session has in the end; those of the last token are not needed yet."""
        return self.prompt_tokens + self.new_tokens - 1


@dataclass(slots=True)
class Growth:
    """Bytes per session by which the processes have grown, an entry for each block."""

    kind: Kind
    by_process: dict[str, list[float]] = field(default_factory=dict)


def kinds_of(num_tokens: int) -> list[Kind]:
    """Long prompts, short ones that become long answers, and prompts with a common beginning."""
    return [
        Kind(f"prompt of {num_tokens // 4} tokens", num_tokens // 4),
        Kind(f"prompt of {num_tokens} tokens", num_tokens),
        Kind(f"answer of {num_tokens // 2} tokens", 16, num_tokens // 2),
        Kind(
            f"prompt of {num_tokens} tokens, the same but for 16", num_tokens, shared_tokens=num_tokens - 16
        ),
    ]


async def measure_memory(
    stack: ServedStack,
    prompts: Prompts,
    *,
    num_tokens: int,
    num_runs: int,
    threads: int,
    sessions: int = SESSIONS_PER_BLOCK,
    on_run: OnRun = lambda done, total: None,
) -> Report:
    """Opens sessions block by block, which stay, and reads the private memory of router and first expert between.

    Args:
        num_tokens: of the longest prompts.
        num_runs: blocks of each kind, after those in which the memory that forwards need settles.
        sessions: of each block.
    """
    slot, folder = next(iter(stack.experts.items()))
    dtype = sizes(folder)["dtype"]
    kv_bytes = {"router": kv_bytes_per_token(stack.checkpoint, ITEMSIZE[dtype]),
                f"expert-{slot}": kv_bytes_per_token(folder, ITEMSIZE[dtype])}  # fmt: skip
    kinds = kinds_of(num_tokens)
    growths = [Growth(kind, {process: [] for process in kv_bytes}) for kind in kinds]
    total, number = (NUM_WARMUPS + num_runs) * len(kinds), 0
    for place, growth in enumerate(growths):
        for block in range(NUM_WARMUPS + num_runs):
            before = await _private_bytes(stack, list(kv_bytes))
            numbers = range(number, number + sessions)
            await _open_sessions(stack, growth.kind, prompts, slot, numbers, place)
            number += sessions
            after = await _private_bytes(stack, list(kv_bytes))
            if block >= NUM_WARMUPS:
                for process, grown in growth.by_process.items():
                    grown.append((after[process] - before[process]) / sessions)
            on_run(number // sessions, total)
    return _report(stack, growths, kv_bytes, {
        **machine(threads), **sizes(folder), "experts": len(stack.experts), "sessions_per_block": sessions,
        "runs": num_runs, "warmups": NUM_WARMUPS,
        **{f"kv_bytes_per_token_{process}": each for process, each in kv_bytes.items()},
    })  # fmt: skip


async def _open_sessions(
    stack: ServedStack, kind: Kind, prompts: Prompts, slot: str, numbers: range, place: int
) -> None:
    """A block of sessions, a few at a time, all of whose tokens go through one expert."""
    common = list(prompts(1_000_000 + place, kind.shared_tokens))
    waiting = iter(numbers)

    async def client() -> None:
        for number in waiting:
            own = prompts(number, kind.prompt_tokens - kind.shared_tokens)
            await stack.turn(request_for([*common, *own], kind.new_tokens, fixed_expert=slot))

    async with asyncio.TaskGroup() as group:
        for _ in range(CLIENTS):
            group.create_task(client())


async def _private_bytes(stack: ServedStack, processes: Sequence[str]) -> dict[str, float]:
    """Memory that only the process itself has, after a moment of quiet."""
    await asyncio.sleep(QUIET_SECONDS)
    return {
        process: float(psutil.Process(stack.pids[process][0]).memory_full_info().uss) for process in processes
    }


def _report(
    stack: ServedStack, growths: Sequence[Growth], kv_bytes: dict[str, int], configuration: dict[str, object]
) -> Report:
    findings: list[Finding] = []
    rows: list[list[Cell]] = []
    bars: dict[str, Spread] = {}
    for growth in growths:
        kind = growth.kind
        for process, grown in growth.by_process.items():
            own = kv_bytes[process] * kind.cached_tokens
            value = Spread(fmean(grown), min(grown), max(grown))
            share = Spread(value.median / own, value.low / own, value.high / own)
            limit = MOST_SHARED if kind.shared_tokens else MOST_BYTES_PER_KV_BYTE
            who = process.partition("-")[0]
            what = f"bytes of a session / of its keys and values, {who}, {kind.name}"
            findings.append(Finding(what, share, at_most=limit))
            rows.append([f"{who}, {kind.name}", kind.cached_tokens, own, value.median, value.low, value.high,
                         share.median])  # fmt: skip
            bars[f"{who}, {kind.name}"] = share
    columns = (
        "process and session",
        "tokens",
        "KV bytes",
        "mean bytes / session",
        "least",
        "most",
        "of KV bytes",
    )
    return Report(
        suite="memory",
        question="What does a session cost in memory?",
        configuration=configuration,
        findings=findings,
        tables=[Table("Growth of private memory for each session that stays", columns, rows)],
        panels=[Bars("Growth for each session", "bytes per byte of its own keys and values", bars, reference=1.0)],
        notes=["Means over all blocks in the place of medians, since allocators take memory in lumps; least and most"
               " are single blocks.",
               "KV bytes: 2 x layers x key-value heads x head size x bytes of a number, for each token of the session.",
               "Of sessions with a common beginning it is what they would have if each kept its own copy."],
    )  # fmt: skip
