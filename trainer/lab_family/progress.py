"""Telling people how far a build is: bars with ETA on a terminal, one line per finished stage elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console


WAITING = "waiting"


@dataclass(frozen=True, slots=True)
class Progress:
    """How far one stage is.

    Attributes:
        stage: ``base``, an expert's slot, ``router``, ``gates``, ``preferences`` or a variant's name; of several
            families after ``seed N: ``; ``waiting`` while another process builds the same.
        step: steps taken.
        num_steps: steps of the stage.
        loss: of the last step.
        build_share: done share of the whole build, by estimated time, 0 to 1.
    """

    stage: str
    step: int
    num_steps: int
    loss: float
    build_share: float


ProgressCallback = Callable[[Progress], None]


@contextmanager
def shown(console: Console | None = None, *, one_bar: bool = False) -> Iterator[ProgressCallback]:
    """A callback for `build` and `build_all` that shows progress on standard error, or on `console`.

    with shown() as progress:
        family = build("demo", progress=progress)

    Args:
        one_bar: for the whole build, which names what has been heard of last; else one more for each stage.
    """
    from rich.console import Console

    screen = console or Console(file=sys.stderr)
    if not screen.is_terminal:
        yield _lines(screen)
        return
    with _bar(screen) if one_bar else _bars(screen) as callback:
        yield callback


def _lines(screen: Console) -> ProgressCallback:
    start = time.monotonic()

    def show(progress: Progress) -> None:
        if progress.stage == WAITING:
            screen.print(
                "lab: another process builds the same family; waiting for it", highlight=False, soft_wrap=True
            )
        elif progress.step == progress.num_steps:
            seconds = time.monotonic() - start
            screen.print(
                f"lab {progress.stage}: {progress.num_steps} steps, loss {progress.loss:.3f}, "
                f"{progress.build_share:.0%} of the build after {seconds:.0f} s",
                highlight=False,
                soft_wrap=True,
            )

    return show


@contextmanager
def _bars(screen: Console) -> Iterator[ProgressCallback]:
    from rich.progress import BarColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    from rich.progress import Progress as Bars

    columns = (
        TextColumn("{task.description:>8}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[loss]}"),
    )
    with Bars(*columns, console=screen) as bars:
        whole = bars.add_task("build", total=1.0, loss="")
        tasks = {}

        def show(progress: Progress) -> None:
            if progress.stage not in tasks:
                tasks[progress.stage] = bars.add_task(progress.stage, total=progress.num_steps, loss="")
            loss = f"step {progress.step}/{progress.num_steps}  loss {progress.loss:.3f}"
            bars.update(tasks[progress.stage], completed=progress.step, loss=loss)
            bars.update(whole, completed=progress.build_share)

        yield show


@contextmanager
def _bar(screen: Console) -> Iterator[ProgressCallback]:
    from rich.progress import BarColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    from rich.progress import Progress as Bars

    columns = (
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        TimeElapsedColumn(),
        TimeRemainingColumn(elapsed_when_finished=True),
        TextColumn("{task.description}"),
    )
    with Bars(*columns, console=screen) as bars:
        whole = bars.add_task("", total=1.0)

        def show(progress: Progress) -> None:
            text = f"{progress.stage}, step {progress.step}/{progress.num_steps}, loss {progress.loss:.3f}"
            bars.update(whole, completed=progress.build_share, description=text)

        yield show
