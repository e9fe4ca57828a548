"""What all suites of `fusionroute bench` share: their options, their progress, and how a report is shown."""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fusionroute.cli.target import json_option

if TYPE_CHECKING:
    from rich.console import Console

    from evaluation.bench_report import Finding, Report, Table

LABS = ("demo", "full")
SHAPE_NAMES = ("h512", "h256", "h128", "h32", "row128k")
DTYPES = ("float32", "bfloat16", "float16")
NOT_OF_THE_SUITE = ("output", "plot", "as_json")
PROGRESS_SECONDS = 5.0
PATH = click.Path(dir_okay=False, path_type=Path)


@dataclass(frozen=True, slots=True)
class Asked:
    """What every suite can be told.

    Attributes:
        lab: trained family, where no shape is given.
        shape: of random weights.
        dtypes: of random weights.
        num_tokens: new tokens of each run.
        num_runs: measured runs of each way.
        threads: of torch in each process; 0 = the cores shared out.
    """

    lab: str
    shape: str | None
    dtypes: tuple[str, ...]
    num_tokens: int
    num_runs: int
    threads: int


def suite(
    *, shape: str | None = None, dtypes: tuple[str, ...] = ("float32",), tokens: int = 64, runs: int = 5
) -> Callable[[Callable[..., Report]], click.Command]:
    """Makes a command of a function from `Asked`, and options of its own, to a report.

    Args:
        shape: the default; None = the trained family.
        dtypes: the default.
        tokens: the default of new tokens.
        runs: the default of runs.
    """

    def make(measure: Callable[..., Report]) -> click.Command:
        @functools.wraps(measure)
        def run(**given: Any) -> None:
            shown = {name: given.pop(name) for name in NOT_OF_THE_SUITE}
            names = ("lab", "shape", "dtypes", "num_tokens", "num_runs", "threads")
            asked = {name: given.pop(name) for name in names}
            if asked["shape"] == "none":
                asked["shape"] = None
            finish(measure(Asked(**asked), **given), **shown)

        for option in reversed(_options(shape, dtypes, tokens, runs)):
            run = option(run)
        return click.command(measure.__name__)(json_option(run))

    return make


def _options(shape: str | None, dtypes: tuple[str, ...], tokens: int, runs: int) -> list[Any]:
    return [
        click.option("--lab", type=click.Choice(LABS), default="demo", show_default=True,
                     help="Which trained family to run, where --shape is none."),
        click.option("--shape", type=click.Choice((*SHAPE_NAMES, "none")), default=shape or "none", show_default=True,
                     help="Random weights of this size: h512 = hidden 512, 8 layers, vocabulary 128,256."),
        click.option("--dtype", "dtypes", type=click.Choice(DTYPES), multiple=True, default=dtypes, show_default=True,
                     help="Number format of --shape; some suites take several."),
        click.option("--tokens", "num_tokens", type=click.IntRange(8, 4000), default=tokens, show_default=True,
                     help="New tokens of each run."),
        click.option("--runs", "num_runs", type=click.IntRange(5), default=runs, show_default=True,
                     help="Measured runs of each way; the median counts."),
        click.option("--threads", type=click.IntRange(0), default=0, show_default=True,
                     help="Torch threads of every process; 0 = the cores shared out."),
        click.option("--output", type=PATH, metavar="FILE", help="Write the JSON there too."),
        click.option("--plot", type=PATH, metavar="FILE", help="Draw a PNG there."),
    ]  # fmt: skip


class Progress:
    """Says on standard error how far the runs are, about every five seconds."""

    def __init__(self, what: str = "") -> None:
        self._what, self._said_at = what, time.monotonic()

    def __call__(self, done: int, total: int) -> None:
        now = time.monotonic()
        if done == total or now - self._said_at > PROGRESS_SECONDS:
            self._said_at = now
            click.echo(f"{self._what}{done} of {total} runs", err=True)


def finish(report: Report, output: Path | None, plot: Path | None, *, as_json: bool) -> None:
    """Writes and draws a report where that is wanted, and prints it."""
    text = json.dumps(report.to_json(), indent=2)
    if output is not None:
        output.write_text(text + "\n", encoding="utf-8")
    if plot is not None:
        from evaluation.bench_plot import write_plot

        write_plot(report, plot)
    if as_json:
        click.echo(text)
    else:
        show(report)


def show(report: Report) -> None:
    """Prints a report: configuration, tables, findings, notes."""
    from fusionroute.cli.console import console

    screen = console()
    screen.print(report.question, style="bold", markup=False)
    told = ", ".join(f"{name} {value}" for name, value in report.configuration.items())
    screen.print(told, style="dim", markup=False)
    for each in report.tables:
        screen.print(f"\n{each.title}", markup=False)
        _show_table(screen, each)
    _show_findings(screen, report)
    for note in report.notes:
        screen.print(note, style="dim", markup=False)


def _show_table(screen: Console, shown: Table) -> None:
    from fusionroute.cli.console import table

    grid = table(*shown.columns, right=tuple(shown.columns[1:]))
    for row in shown.rows:
        grid.add_row(*(_cell(value) for value in row))
    screen.print(grid)


def _show_findings(screen: Console, report: Report) -> None:
    from fusionroute.cli.console import table

    grid = table("finding", "median", "least", "most", "aim", "", right=("median", "least", "most"))
    for each in report.findings:
        value = each.value
        grid.add_row(f"{each.what}", *(_cell(x) + (f" {each.unit}" if each.unit else "") for x in (value.median,)),
                     _cell(value.low), _cell(value.high), each.aim, _verdict(each))  # fmt: skip
    screen.print()
    screen.print(grid)
    screen.print()


def _verdict(finding: Finding) -> str:
    return {True: "met", False: "missed", None: ""}[finding.is_met]


def _cell(value: str | float | None) -> str:
    if value is None:
        return "-"
    if isinstance(value, str):
        return value
    if isinstance(value, int):
        return f"{value:,}"
    size = abs(value)
    return f"{value:,.0f}" if size >= 1000 else f"{value:.1f}" if size >= 100 else f"{value:.3f}"
