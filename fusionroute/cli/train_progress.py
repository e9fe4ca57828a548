"""How far a training run is, on a terminal as bars, elsewhere as a line now and then; always on standard error."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

    from fusionroute.v1.trainer_pb2 import JobProgress
    from trainer.run_context import RunProgress

LINE_SECONDS = 10.0
# What is worth a place beside the loss: name of the metric, how it is called, its format.
SHOWN_METRICS = (
    ("rewards/accuracies", "accuracy", "{:.2f}"),
    ("rewards/margins", "margin", "{:+.2f}"),
    ("flip_rate", "flips", "{:.3f}"),
    ("tokens_per_second", "tokens/s", "{:,.0f}"),
    ("greedy_wrong", "wrong", "{:,.0f}"),
    ("sampled_wrong", "sampled wrong", "{:,.0f}"),
    ("problems", "problems", "{:,.0f}"),
)

ShowProgress = Callable[["RunProgress"], None]


@contextmanager
def shown_progress(screen: Console | None = None) -> Iterator[ShowProgress]:
    """A function that shows each progress it is told; anything printed meanwhile stands above the bars."""
    from fusionroute.cli.console import console

    screen = screen or console(stderr=True)
    if not screen.is_terminal:
        yield _noting(screen, ProgressLines(screen).show)
        return
    with _bars(screen) as show:
        yield _noting(screen, show)


def _noting(screen: Console, show: ShowProgress) -> ShowProgress:
    """Prints each note once before it shows the progress that brings it."""
    noted = ""

    def show_with_note(progress: RunProgress) -> None:
        nonlocal noted
        if progress.note and progress.note != noted:
            noted = progress.note
            screen.print(noted, markup=False, highlight=False)
        show(progress)

    return show_with_note


class ProgressLines:
    """One line when a stage begins and ends, and every ten seconds between."""

    def __init__(self, screen: Console, clock: Callable[[], float] = time.monotonic) -> None:
        self._screen, self._clock = screen, clock
        self._stage = ""
        self._last_step = -1
        self._next_line = 0.0

    def show(self, progress: RunProgress) -> None:
        """Prints a line where one is due."""
        now = self._clock()
        is_new = progress.stage != self._stage
        is_done = 0 < progress.num_steps <= progress.step and progress.step != self._last_step
        if not (is_new or is_done or now >= self._next_line):
            return
        self._stage, self._last_step, self._next_line = progress.stage, progress.step, now + LINE_SECONDS
        remaining = progress.remaining_seconds
        left = "" if remaining is None or is_done else f"{duration_text(remaining)} left"
        words = (f"{progress.stage} {count_text(progress)}", figures_text(progress), left)
        self._screen.print(", ".join(word for word in words if word.strip()), markup=False)


@contextmanager
def _bars(screen: Console) -> Iterator[ShowProgress]:
    from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

    columns = (
        TextColumn("{task.description:>10}"),
        BarColumn(bar_width=30),
        TextColumn("{task.fields[count]:>13}"),
        TimeElapsedColumn(),
        TextColumn("{task.fields[left]:>10}"),
        TextColumn("{task.fields[figures]}"),
    )
    tasks: dict[str, TaskID] = {}
    with Progress(*columns, console=screen) as bars:

        def show(progress: RunProgress) -> None:
            stage = progress.stage
            if stage not in tasks:
                for (
                    earlier
                ) in tasks.values():  # a stage that another one follows is done, whatever it counted
                    bars.update(earlier, completed=bars.tasks[earlier].total or 1, left="")
                    bars.stop_task(earlier)
                tasks[stage] = bars.add_task(stage, total=None, count="", left="", figures="")
            remaining = progress.remaining_seconds
            is_done = 0 < progress.num_steps <= progress.step
            bars.update(
                tasks[stage],
                total=progress.num_steps or None,
                completed=progress.step,
                count=count_text(progress),
                left="" if remaining is None or is_done else f"{duration_text(remaining)} left",
                figures=figures_text(progress),
            )

        yield show


def count_text(progress: RunProgress) -> str:
    """ "120/372", or only what is done where the whole is not known."""
    return f"{progress.step:,}/{progress.num_steps:,}" if progress.num_steps else f"{progress.step:,}"


def figures_text(progress: RunProgress) -> str:
    """Loss and the metrics worth a look: "loss 0.412, accuracy 0.93"."""
    words = [] if progress.loss is None else [f"loss {progress.loss:.3f}"]
    for name, label, form in SHOWN_METRICS:
        if name in progress.metrics:
            words.append(f"{label} {form.format(progress.metrics[name])}")
    return ", ".join(words)


def duration_text(seconds: float) -> str:
    """ "42 s", "3:07 min", "2:05 h"."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60}:{whole % 60:02d} min"
    return f"{whole // 3600}:{whole % 3600 // 60:02d} h"


def progress_of(message: JobProgress) -> RunProgress:
    """What a trainer service says of a job, as the run itself would say it."""
    from trainer.run_context import RunProgress

    metrics: Mapping[str, float] = dict(message.metrics)
    return RunProgress(
        stage=message.stage,
        step=message.step,
        num_steps=message.num_steps,
        loss=message.loss if message.HasField("loss") else None,
        metrics=metrics,
        remaining_seconds=message.remaining_seconds if message.HasField("remaining_seconds") else None,
        note=message.note,
    )
