"""Several ways to do the same work, measured in turns: a slow minute of the machine hits all of them alike.

Beside the clock on the wall stands the processor time of all processes that take part: who waits while another
program computes does not get slower by it.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass, field

import psutil

NUM_WARMUPS = 2

Way = Callable[[int], Awaitable[int]]
"""Does the work of a round, given the round's number, and says how many tokens came of it."""

OnRun = Callable[[int, int], None]
"""Told how many runs have ended and how many there will be, warm-ups included."""


@dataclass(slots=True)
class Runs:
    """What the runs of one way took, one entry each."""

    name: str
    num_tokens: list[int] = field(default_factory=list)
    wall_seconds: list[float] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)

    @property
    def ms_per_token(self) -> list[float]:
        """Of each run, by the clock on the wall."""
        return [1000 * each / count for each, count in zip(self.wall_seconds, self.num_tokens, strict=True)]

    @property
    def cpu_ms_per_token(self) -> list[float]:
        """Of each run, processor time of all processes."""
        return [1000 * each / count for each, count in zip(self.cpu_seconds, self.num_tokens, strict=True)]

    @property
    def tokens_per_second(self) -> list[float]:
        """Of each run."""
        return [count / each for each, count in zip(self.wall_seconds, self.num_tokens, strict=True)]

    def to_json(self) -> dict[str, object]:
        """Every run, for programs."""
        return {
            "tokens": self.num_tokens,
            "wall_seconds": self.wall_seconds,
            "cpu_seconds": self.cpu_seconds,
        }


@dataclass(frozen=True, slots=True)
class Spread:
    """A median with the least and the largest of what it is of."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread:
        """Of at least one value."""
        each = list(values)
        return cls(statistics.median(each), min(each), max(each))


def ratio(above: Iterable[float], below: Iterable[float]) -> Spread:
    """Of what two ways took in the same rounds, round by round."""
    return Spread.of(a / b for a, b in zip(above, below, strict=True))


class CpuClock:
    """Processor time that this process and others have used so far."""

    def __init__(self, pids: Iterable[int] = ()) -> None:
        self._pids = tuple(pids)

    def seconds(self) -> float:
        """Of all of them; those that have ended count nothing."""
        return time.process_time() + sum(_cpu_seconds(pid) for pid in self._pids)


async def take_turns(
    ways: Mapping[str, Way],
    *,
    num_runs: int,
    pids: Iterable[int] = (),
    num_warmups: int = NUM_WARMUPS,
    prepare: Callable[[int], Awaitable[None]] | None = None,
    tidy: Callable[[], Awaitable[None]] | None = None,
    on_run: OnRun = lambda done, total: None,
) -> dict[str, Runs]:
    """Runs all ways once in each round, each round beginning with another one.

    Args:
        ways: by name.
        num_runs: measured rounds, after `num_warmups` that are not.
        pids: of the processes that take part beside this one.
        prepare: called before each round with its number, outside what is measured.
        tidy: called after each run, outside what is measured.
        on_run: told after each run.
    """
    cpu = CpuClock(pids)
    runs = {name: Runs(name) for name in ways}
    names = list(ways)
    total = (num_warmups + num_runs) * len(names)
    for number in range(num_warmups + num_runs):
        first = number % len(names)
        if prepare is not None:
            await prepare(number)
        for place, name in enumerate(names[first:] + names[:first]):
            cpu_before, started = cpu.seconds(), time.perf_counter()
            num_tokens = await ways[name](number)
            wall, cpu_used = time.perf_counter() - started, cpu.seconds() - cpu_before
            if number >= num_warmups:
                runs[name].num_tokens.append(num_tokens)
                runs[name].wall_seconds.append(wall)
                runs[name].cpu_seconds.append(cpu_used)
            if tidy is not None:
                await tidy()
            on_run(number * len(names) + place + 1, total)
    return runs


def _cpu_seconds(pid: int) -> float:
    try:
        # Linux's clock of another process counts nanoseconds, psutil ticks of 10 ms.
        return time.clock_gettime((~pid << 3) | 2)
    except OSError:
        pass
    try:
        times = psutil.Process(pid).cpu_times()
    except psutil.NoSuchProcess:
        return 0.0
    return float(times.user + times.system)
