"""What HTTP costs beside gRPC: first byte, first token and every further token of the same answers, in turns."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, aclosing
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

from evaluation.bench_http_client import COMPLETIONS, TGI, Api, HttpConnection, Streamed
from evaluation.bench_machine import machine, sizes
from evaluation.bench_report import Bars, Cell, Finding, Report, Table
from evaluation.bench_runs import NUM_WARMUPS, OnRun, Runs, Spread, Way, ratio, take_turns
from evaluation.bench_served import ServedStack
from fusionroute.v1.router_pb2 import GenerateRequest

GRPC = "gRPC, Generate"
APIS: Mapping[str, Api] = {"HTTP, /v1/completions": COMPLETIONS, "HTTP, /generate_stream": TGI}
SESSIONS = (1, 8)
TRIES = 16
"""Prompts for each one that is wanted."""

Texts = Callable[[int], str]
"""The prompt of a number."""
Asking = Callable[[int, str], Awaitable[Streamed]]
"""The answer to a prompt, by the client of a number."""


@dataclass(slots=True)
class Measured:
    """One way, an entry for each measured round: means over its sessions, milliseconds."""

    first_byte_ms: list[float] = field(default_factory=list)
    first_token_ms: list[float] = field(default_factory=list)
    further_ms: list[float] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)

    def add(self, answers: Sequence[Streamed]) -> None:
        """What the sessions of a round brought."""
        self.first_byte_ms.append(1000 * fmean(each.first_byte for each in answers))
        self.first_token_ms.append(1000 * fmean(each.arrived[0] for each in answers))
        gaps = [(each.arrived[-1] - each.arrived[0]) / (len(each.arrived) - 1) for each in answers]
        self.further_ms.append(1000 * fmean(gaps))
        self.texts += [each.text for each in answers]


async def measure_http(
    stack: ServedStack,
    texts: Texts,
    *,
    num_tokens: int,
    num_runs: int,
    threads: int,
    sessions: Sequence[int] = SESSIONS,
    on_run: OnRun = lambda done, total: None,
) -> Report:
    """Measures the same router over gRPC and over HTTP, on the same prompts in turns.

    Args:
        stack: whose router speaks HTTP.
        num_tokens: new tokens of each session at most.
        sessions: how many at a time, each on a connection of its own.
    """
    measured: dict[str, Measured] = {}
    ways: dict[str, Way] = {}
    http_address = stack.http_urls["router"].removeprefix("http://")
    async with AsyncExitStack() as closing:
        connections = [
            await closing.enter_async_context(HttpConnection.open(http_address)) for _ in range(max(sessions))
        ]
        askings = {GRPC: _over_grpc(stack, num_tokens)}
        askings |= {name: _over_http(connections, api, num_tokens) for name, api in APIS.items()}
        prompts = await _whole_answers(askings[GRPC], texts, max(sessions), num_tokens)
        for count in sessions:
            for name, ask in askings.items():
                measured[_name(name, count)] = Measured()
                ways[_name(name, count)] = _way(ask, measured[_name(name, count)], prompts[:count])
        runs = await take_turns(ways, num_runs=num_runs, pids=stack.all_pids, on_run=on_run)
    configuration = {
        **machine(threads), **sizes(stack.checkpoint), "experts": len(stack.experts), "new_tokens": num_tokens,
        "runs": num_runs, "warmups": NUM_WARMUPS, "combine": "sum", "greedy": True,
    }  # fmt: skip
    return _report(configuration, runs, measured, sessions)


def _over_grpc(stack: ServedStack, num_tokens: int) -> Asking:
    async def ask(client: int, text: str) -> Streamed:
        request = GenerateRequest(text=text, one_off=True)
        request.sampling.max_tokens = num_tokens
        answer, started = Streamed(), time.perf_counter()
        async with aclosing(stack.router.generate(request)) as events:
            async for event in events:
                kind = event.WhichOneof("event")
                if kind == "token":
                    answer.arrived.append(time.perf_counter() - started)
                    answer.text += event.token.text
                elif kind == "started":
                    answer.first_byte = time.perf_counter() - started
                else:
                    answer.text += event.finished.text
        return answer

    return ask


def _over_http(connections: Sequence[HttpConnection], api: Api, num_tokens: int) -> Asking:
    async def ask(client: int, text: str) -> Streamed:
        return await connections[client].stream(api, text, num_tokens)

    return ask


async def _whole_answers(ask: Asking, texts: Texts, wanted: int, num_tokens: int) -> list[str]:
    """So many prompts whose answers do not end early: TGI's API cannot ask for more. All ways find them known.

    Raises:
        RuntimeError: there are too few.
    """
    found: list[str] = []
    for number in range(TRIES * wanted):
        if len(found) == wanted:
            break
        if len((await ask(0, texts(number))).arrived) == num_tokens:
            found.append(texts(number))
    if len(found) < wanted:
        raise RuntimeError(
            f"{TRIES * wanted} prompts: {len(found)} answers of {num_tokens} tokens, {wanted} wanted"
        )
    return found


def _way(ask: Asking, measured: Measured, prompts: Sequence[str]) -> Way:
    """All prompts at a time."""

    async def run(number: int) -> int:
        answers = await asyncio.gather(*(ask(place, text) for place, text in enumerate(prompts)))
        if number >= NUM_WARMUPS:
            measured.add(answers)
        return sum(len(each.arrived) for each in answers)

    return run


def _name(name: str, count: int) -> str:
    return f"{name}, 1 session" if count == 1 else f"{name}, {count} sessions"


def _report(
    configuration: Mapping[str, Any],
    runs: Mapping[str, Runs],
    measured: Mapping[str, Measured],
    sessions: Sequence[int],
) -> Report:
    rows: list[list[Cell]] = []
    for name, each in measured.items():
        lists = (each.first_byte_ms, each.first_token_ms, each.further_ms, runs[name].cpu_ms_per_token)
        rows.append([name, *(Spread.of(values).median for values in lists)])
    columns = ("way", "first byte, ms", "first token, ms", "each further token, ms", "CPU ms / token")
    return Report(
        suite="http",
        question="What does HTTP cost beside gRPC?",
        configuration=configuration,
        findings=[
            finding for count in sessions for api in APIS
            for finding in _findings(runs, measured, _name(GRPC, count), _name(api, count))
        ],
        tables=[Table("The same answers from the same router", columns, rows)],
        panels=[
            Bars("First token", "ms", {name: Spread.of(each.first_token_ms) for name, each in measured.items()}),
            Bars("Each further token", "ms", {name: Spread.of(each.further_ms) for name, each in measured.items()}),
        ],
        notes=["First byte: of the answer's head; over gRPC the event that says the turn has begun.",
               "Open connections on both sides. The HTTP client reads the socket itself and decodes each event's JSON;"
               " it computes on the same cores, as gRPC's client does, and is counted in CPU time."],
        runs={"http": runs},
    )  # fmt: skip


def _findings(
    runs: Mapping[str, Runs], measured: Mapping[str, Measured], grpc: str, http: str
) -> list[Finding]:
    """One way over HTTP against gRPC."""
    ours, theirs = measured[http], measured[grpc]
    cpu = runs[http].cpu_ms_per_token, runs[grpc].cpu_ms_per_token
    same = fmean(a == b for a, b in zip(ours.texts, theirs.texts, strict=True))
    return [
        Finding(f"time to first byte / gRPC's, {http}", ratio(ours.first_byte_ms, theirs.first_byte_ms)),
        Finding(f"time to first token / gRPC's, {http}", ratio(ours.first_token_ms, theirs.first_token_ms)),
        Finding(f"each further token / gRPC's, {http}", ratio(ours.further_ms, theirs.further_ms)),
        Finding(f"overhead per token, {http}", _difference(ours.further_ms, theirs.further_ms), unit="ms"),
        Finding(f"overhead per token, CPU of all processes, {http}", _difference(*cpu), unit="ms"),
        Finding(f"same texts as over gRPC, {http}", Spread.of([same]), at_least=1.0),
    ]


def _difference(ours: Sequence[float], theirs: Sequence[float]) -> Spread:
    """Round by round."""
    return Spread.of(a - b for a, b in zip(ours, theirs, strict=True))
