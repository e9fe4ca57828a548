"""What the way of a logits row between two processes costs, forwards and queues taken off, and how many bytes it is.

A client of its own asks one expert whose forward is almost nothing: by unary calls; on a stream with rows in messages,
with rows in shared memory, and for the highest logits only; and over the socket that a router uses on its own host.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from itertools import count

import numpy as np

from evaluation.bench_machine import machine, sizes
from evaluation.bench_report import Bars, Cell, Finding, Report, Table
from evaluation.bench_runs import NUM_WARMUPS, OnRun, Runs, Spread, Way, take_turns
from evaluation.bench_served import ServedStack
from evaluation.bench_wire_client import ExpertWire, Reply
from fusionroute.v1 import expert_pb2

STEPS_PER_RUN = 50
TOP_LOGITS = 256
UNARY, STREAM, SHARED, SHORT = "unary", "stream", "stream, shared memory", f"stream, top {TOP_LOGITS} only"
SOCKET, SOCKET_SHARED = "socket", "socket, shared memory"
KINDS = (UNARY, STREAM, SHARED, SOCKET, SOCKET_SHARED, SHORT)
MOST_MS = {SOCKET: 0.5, SOCKET_SHARED: 0.25}
"""Of what the router uses on its own host: rows in shared memory, and in messages where there is no room."""
LEAST_SHRINKING = 50.0

Exchange = Callable[[expert_pb2.StepRequest], Awaitable[Reply]]


@dataclass(slots=True)
class Taken:
    """What the round trips of one way took, an entry for each run.

    Attributes:
        wire_ms: mean of a round trip beyond forward and queue.
        round_trip_ms: mean of all of it.
        row_bytes: of a response and its request.
        ids: the best id of each row.
    """

    wire_ms: list[float] = field(default_factory=list)
    round_trip_ms: list[float] = field(default_factory=list)
    row_bytes: float = 0.0
    ids: list[list[int]] = field(default_factory=list)


async def measure_wire(
    stacks: Mapping[str, ServedStack],
    prompt: Sequence[int],
    *,
    num_runs: int,
    threads: int,
    steps: int = STEPS_PER_RUN,
    on_run: OnRun = lambda done, total: None,
) -> Report:
    """Measures all kinds of wire to the first expert of each stack, in turns.

    Args:
        stacks: by number format of their models.
        steps: round trips of each run, one new token each.
    """
    taken: dict[str, Taken] = {}
    ways: dict[str, Way] = {}
    numbers = count()
    async with AsyncExitStack() as closing:
        for dtype, stack in stacks.items():
            address = stack.addresses[f"expert-{next(iter(stack.experts))}"]
            wire = await closing.enter_async_context(ExpertWire.open(address))
            plain = await closing.enter_async_context(wire.stream(shares_memory=False))
            shared = await closing.enter_async_context(wire.stream(shares_memory=True))
            socket = await closing.enter_async_context(wire.line(shares_memory=False))
            socket_shared = await closing.enter_async_context(wire.line(shares_memory=True))
            exchanges = {
                UNARY: wire.unary, STREAM: plain.step, SHARED: shared.step, SHORT: plain.step, SOCKET: socket.step,
                SOCKET_SHARED: socket_shared.step,
            }  # fmt: skip
            for kind in KINDS:
                name = f"{dtype}, {kind}"
                taken[name] = Taken()
                session = f"bench-wire-{next(numbers)}"
                ways[name] = _way(wire, exchanges[kind], taken[name], prompt, steps, session, kind == SHORT)
        pids = [pid for stack in stacks.values() for pid in stack.all_pids]
        runs = await take_turns(ways, num_runs=num_runs, pids=pids, on_run=on_run)
    return _report(stacks, taken, runs, steps, num_runs, threads)


def _way(
    wire: ExpertWire,
    exchange: object,
    taken: Taken,
    prompt: Sequence[int],
    steps: int,
    session: str,
    is_short: bool,
) -> Way:
    assert callable(exchange)

    async def run(number: int) -> int:
        session_id = f"{session}-{number}"
        fed = list(prompt)
        wire_seconds = all_seconds = 0.0
        num_bytes, ids = 0, []
        for step in range(steps + 1):
            position = 0 if step == 0 else len(prompt) + step - 1
            request = expert_pb2.StepRequest(
                session_id=session_id, from_position=position, token_ids=fed, num_rows=1,
                top_logits=min(TOP_LOGITS, wire.width) if is_short else 0,
            )  # fmt: skip
            started = time.perf_counter()
            reply = await exchange(request)
            seconds = time.perf_counter() - started
            fed = [(7 * step + 3) % wire.width]
            if step == 0:
                continue  # the prompt
            timings = reply.response.timings
            all_seconds += seconds
            wire_seconds += seconds - timings.forward_seconds - timings.queue_seconds
            num_bytes += request.ByteSize() + reply.num_bytes
            ids.append(reply.best)
        await wire.close_session(session_id)
        taken.ids.append(ids)
        taken.row_bytes = num_bytes / steps
        if number >= NUM_WARMUPS:
            taken.wire_ms.append(1000 * wire_seconds / steps)
            taken.round_trip_ms.append(1000 * all_seconds / steps)
        return steps

    return run


def _share_of_same_ids(ways: Sequence[Taken]) -> float:
    """Of the runs of all ways but the first, those with the ids that it had in the same run."""
    first, *others = ways
    same = [mine == its for each in others for mine, its in zip(each.ids, first.ids, strict=True)]
    return float(np.mean(same))


def _report(
    stacks: Mapping[str, ServedStack],
    taken: Mapping[str, Taken],
    runs: Mapping[str, Runs],
    steps: int,
    num_runs: int,
    threads: int,
) -> Report:
    findings: list[Finding] = []
    rows: list[list[Cell]] = []
    for dtype in stacks:
        short, whole = taken[f"{dtype}, {SHORT}"], taken[f"{dtype}, {STREAM}"]
        for kind in KINDS:
            each = taken[f"{dtype}, {kind}"]
            value, trip = Spread.of(each.wire_ms), Spread.of(each.round_trip_ms)
            what = f"wire of a row, {dtype}, {kind}"
            findings.append(Finding(what, value, at_most=MOST_MS.get(kind), unit="ms"))
            cpu = Spread.of(runs[f"{dtype}, {kind}"].cpu_ms_per_token)
            rows.append([
                f"{dtype}, {kind}", value.median, value.low, value.high, trip.median, cpu.median,
                round(each.row_bytes),
            ])  # fmt: skip
        shrunk = whole.row_bytes / short.row_bytes
        findings += [
            Finding(
                f"bytes of a whole row / of the short reply, {dtype}",
                Spread.of([shrunk]),
                at_least=LEAST_SHRINKING,
            ),
            Finding(
                f"runs with the same best ids in every way, {dtype}",
                Spread.of([_share_of_same_ids([taken[f"{dtype}, {kind}"] for kind in KINDS])]),
                at_least=1.0,
            ),
        ]
    first = next(iter(stacks.values()))
    columns = ("wire", "ms / row", "least", "most", "round trip, ms", "round trip, CPU ms", "bytes / row")
    return Report(
        suite="wire",
        question="What does the way of a row between two processes of one host cost?",
        configuration={
            **machine(threads), **sizes(next(iter(first.experts.values()))), "dtype": " and ".join(stacks),
            "round_trips_per_run": steps, "runs": num_runs, "warmups": NUM_WARMUPS,
        },
        findings=findings,
        tables=[Table("Round trips of one token and one row", columns, rows)],
        panels=[
            Bars("Beyond forward and queue", "ms per row",
                 {name: Spread.of(each.wire_ms) for name, each in taken.items()}),
            Bars("In messages", "KB per row",
                 {name: Spread.of([each.row_bytes / 1000]) for name, each in taken.items()}),
        ],
        notes=["The client asks for one step after the other and finds the best id of each row, as the router does for"
               " a single greedy session.",
               "'Same best ids' compares first ids only; that a short reply decides like the whole row, greedily and"
               " sampled, is for the tests of the served stack."],
        runs={"wire": runs},
    )  # fmt: skip
