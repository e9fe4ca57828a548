"""Runs the kill matrix: the undisturbed run first, then cell by cell the same requests while something is hurt."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from fusionroute.client import RouterClient
from tests.chaos.building import running_stack
from tests.chaos.faults import (
    MATRIX,
    UNDISTURBED,
    Cell,
    Component,
    Fault,
    Hit,
    NoMoment,
    choose_victim,
    strike,
)
from tests.chaos.judge import (
    Judgement,
    excerpt,
    judge_remains,
    judge_stored,
    judge_streams,
    undisturbed_cases,
)
from tests.chaos.load import Clients, Stream, read_all
from tests.chaos.redis_past import RedisPast
from tests.chaos.remains import remains_of
from tests.chaos.stack import ChaosStack, StackSettings
from tests.equivalence import Case, make_cases
from tests.served_stack import make_family

FLIGHT_SECONDS = 40.0
RESTORE_SECONDS = 150.0
MOST_LOADS = 4

OnCell = Callable[[Cell, Judgement | None], None]
"""Hears of a cell when it begins (None) and when it is judged."""


@dataclass(frozen=True, slots=True)
class MatrixOptions:
    """What is run.

    Attributes:
        num_generations: over all cells, the undisturbed run not counted; rounded up to equal shares.
        pause_seconds: how long SIGSTOP, slowness, partitions and absences of clients last.
        num_concurrent: generations at a time.
    """

    cells: Sequence[Cell] = MATRIX
    num_generations: int = 288
    pause_seconds: float = 10.0
    num_concurrent: int = 6
    max_tokens: int = 64
    seed: int = 7
    stack: StackSettings = field(default_factory=StackSettings)

    @property
    def num_per_cell(self) -> int:
        """Generations in one cell."""
        return max(1, -(-self.num_generations // max(1, len(self.cells))))

    @property
    def stream_seconds(self) -> float:
        """How long a client has patience."""
        return 150.0 + 2 * self.pause_seconds


@dataclass(slots=True)
class MatrixReport:
    """What has come out."""

    options: MatrixOptions
    judgements: list[Judgement] = field(default_factory=list)
    left_behind: list[str] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def disturbed(self) -> list[Judgement]:
        """The cells without the undisturbed run."""
        return [j for j in self.judgements if j.cell != str(UNDISTURBED)]

    @property
    def passed(self) -> bool:
        """Every cell has passed, all were run, and nothing is left."""
        return (
            len(self.disturbed) == len(self.options.cells)
            and all(judgement.passed for judgement in self.judgements)
            and not self.left_behind
        )

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        options = self.options
        return {
            "passed": self.passed,
            "seconds": round(self.seconds, 1),
            "pause_seconds": options.pause_seconds,
            "seed": options.seed,
            "num_generations": sum(j.num_generations for j in self.disturbed),
            "left_behind": self.left_behind,
            "cells": [judgement.as_dict() for judgement in self.judgements],
        }


async def run_matrix(
    options: MatrixOptions, folder: Path, on_cell: OnCell = lambda cell, judgement: None
) -> MatrixReport:
    """The whole matrix on a stack in `folder`. A cell that fails does not end it."""
    started_at = time.monotonic()
    report = MatrixReport(options)
    family = await asyncio.to_thread(make_family, folder / "family")
    reference = replace(family.reference(), end_ids=frozenset())
    cases = await asyncio.to_thread(
        make_cases, reference, options.num_per_cell, max_tokens=options.max_tokens, seed=options.seed
    )
    (folder / "stack").mkdir()
    async with running_stack(family, folder / "stack", options.stack) as stack:
        run = _Run(options, stack, cases)
        on_cell(UNDISTURBED, None)
        report.judgements.append(await run.undisturbed())
        on_cell(UNDISTURBED, report.judgements[-1])
        for cell in options.cells:
            on_cell(cell, None)
            report.judgements.append(await run.cell(cell))
            on_cell(cell, report.judgements[-1])
    report.left_behind = remains_of(stack)
    report.seconds = time.monotonic() - started_at
    return report


@dataclass(slots=True)
class _Run:
    options: MatrixOptions
    stack: ChaosStack
    cases: list[Case]
    num_cells: int = 0

    async def undisturbed(self) -> Judgement:
        """Nobody is hurt: the answers are the reference's, and from now on what all others must be."""
        streams = [Stream(case) for case in self.cases]
        started_at = time.monotonic()
        await self._read(streams, first=None)
        judgement = judge_streams(UNDISTURBED, None, streams, self.cases)
        await self._judge_rest(judgement, streams, started_at)
        self.cases = undisturbed_cases(self.cases, streams)
        return judgement

    async def cell(self, cell: Cell) -> Judgement:
        """Reads the same requests as new sessions while something is hurt."""
        self.num_cells += 1
        streams: list[Stream] = []
        started_at = time.monotonic()
        log_sizes = {node.process.name: _size(node.process.log) for node in self.stack.nodes}
        deaths = {node.process.name: len(node.process.deaths) for node in self.stack.nodes}
        hit: Hit | None = None
        problem = ""
        for _ in range(MOST_LOADS):  # where routing leaves the victim aside, the same load is put on once more
            streams += (load := [Stream(case) for case in self.cases])
            try:
                hit = await self._hurt(cell, load)
                break
            except NoMoment:
                continue
            except TimeoutError as error:
                problem = f"the victim did not do as it was told: {error!r}"
                break
        judgement = judge_streams(cell, hit, streams, self.cases * (len(streams) // len(self.cases)))
        if problem:
            judgement.fail(problem)
        elif judgement.num_hit < self._num_to_hit(cell):
            judgement.fail(f"the fault hit {judgement.num_hit} generations, not {self._num_to_hit(cell)} or more")
        try:
            await self.stack.restore(RESTORE_SECONDS)
        except TimeoutError:
            judgement.fail(f"the stack did not recover in {RESTORE_SECONDS:g} s: {self.stack.last_missing}")
        self._judge_deaths(judgement, cell, deaths)
        await self._judge_rest(judgement, streams, started_at)
        if not judgement.passed:
            judgement.log_excerpt = excerpt(self._logs_since(log_sizes))
        return judgement

    async def _hurt(self, cell: Cell, streams: list[Stream]) -> Hit:
        """Strikes while generations are in flight, and reads all of them to their end."""
        router = self.num_cells % len(self.stack.routers)
        if cell.component is Component.CLIENT:
            return await self._leave_and_return(streams)
        first = router if cell.component is Component.ROUTER else None
        async with AsyncExitStack() as around:
            past = None
            if cell.fault is Fault.LOST_SECOND:
                past = await around.enter_async_context(RedisPast(self.stack))
            if cell.fault in (Fault.FLUSH, Fault.LOST_SECOND):
                for stream in streams[::2]:  # these are read at another router than the one that writes
                    stream.leaves_after, stream.returns_by_resume = 1, False
            reading = asyncio.create_task(self._read(streams, first))
            around.push_async_callback(asyncio.wait, [reading])
            victim, touched = await choose_victim(
                self.stack, cell, streams, router, self._num_to_hit(cell), FLIGHT_SECONDS
            )
            note = await strike(self.stack, cell.fault, victim, self.options.pause_seconds, past)
            await reading
            return Hit(victim.process.name, touched, note)

    def _num_to_hit(self, cell: Cell) -> int:
        """Generations that a fault must hit: half of those that run at a time, of which replicas share some."""
        share = 3 if cell.component is Component.REPLICA else 2
        return max(1, min(self.options.num_concurrent, self.options.num_per_cell) // share)

    async def _leave_and_return(self, streams: list[Stream]) -> Hit:
        """Every client hangs up in the middle; half of them come back at once, half after a long time."""
        for number, stream in enumerate(streams):
            stream.leaves_after = 5 + number
            stream.away_seconds = self.options.pause_seconds if number % 2 else 0.2
            stream.returns_by_resume = number % 4 < 2
        await self._read(streams, first=None)
        return Hit("clients", tuple(stream for stream in streams if stream.has_left))

    async def _read(self, streams: list[Stream], first: int | None) -> None:
        """Reads all; clients ask router `first`, or all routers in turn."""
        clients = Clients([node.front.address for node in self.stack.routers], self.options.stream_seconds)
        count = len(self.stack.routers)
        firsts = [number % count if first is None else first for number in range(len(streams))]
        await read_all(clients, streams, firsts, self.options.num_concurrent)

    async def _judge_rest(self, judgement: Judgement, streams: list[Stream], started_at: float) -> None:
        router = self.stack.routers[self.num_cells % len(self.stack.routers)]
        async with RouterClient.open(router.front.address) as client:
            await judge_stored(judgement, client, streams)
            await judge_remains(judgement, self.stack, client, streams)
        judgement.seconds = time.monotonic() - started_at

    def _judge_deaths(self, judgement: Judgement, cell: Cell, before: Mapping[str, int]) -> None:
        """Nobody died but the victim, and a victim that was asked to stop did so in good order."""
        for node in self.stack.nodes:
            process = node.process
            codes = [death.code for death in process.deaths[before[process.name] :]]
            wanted = _deaths_of(cell.fault) if process.name == judgement.victim else 0
            if len(codes) != wanted:
                judgement.fail(f"{process.name} ended {len(codes)} times with {codes} instead of {wanted}")
            elif cell.fault is Fault.RESTART and any(codes):
                judgement.fail(f"{process.name} ended with {codes} when asked to stop")

    def _logs_since(self, sizes: Mapping[str, int]) -> dict[str, str]:
        logs = {}
        for node in self.stack.nodes:
            with contextlib.suppress(FileNotFoundError), node.process.log.open("rb") as log:
                log.seek(sizes[node.process.name])
                logs[node.process.name] = log.read().decode(errors="replace")
        return logs


def _deaths_of(fault: Fault) -> int:
    return int(fault in (Fault.KILL, Fault.RESTART, Fault.LOST_SECOND))


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0
