"""The matrix as a table: at the terminal, as markdown, as JSON."""

from __future__ import annotations

import json
from pathlib import Path

from rich.console import Console
from rich.table import Table

from tests.chaos.judge import Judgement
from tests.chaos.matrix import MatrixReport

COLUMNS = (
    "cell",
    "generations",
    "hit in flight",
    "complete",
    "ids equal",
    "float ties",
    "missing or repeated",
    "epochs back",
    "stored otherwise",
    "left behind",
    "longest pause, s",
    "verdict",
)


def row(judgement: Judgement) -> tuple[str, ...]:
    """The cells of a judgement's row, in the order of COLUMNS."""
    note = f" ({judgement.note})" if judgement.note else ""
    return (
        f"{judgement.cell}{note}",
        str(judgement.num_generations),
        str(judgement.num_hit),
        str(judgement.num_complete),
        str(judgement.num_equal),
        str(judgement.num_ties),
        str(judgement.num_broken),
        str(judgement.num_epochs_back),
        str(judgement.num_stored_different),
        str(len(judgement.left_behind)),
        f"{judgement.longest_pause_seconds:.1f}",
        "passed" if judgement.passed else "FAILED",
    )


def total(report: MatrixReport) -> tuple[str, ...]:
    """The last row: sums, and the longest pause of all."""
    cells = report.disturbed
    sums = [
        sum(values)
        for values in zip(
            *(
                (
                    j.num_generations,
                    j.num_hit,
                    j.num_complete,
                    j.num_equal,
                    j.num_ties,
                    j.num_broken,
                    j.num_epochs_back,
                    j.num_stored_different,
                    len(j.left_behind),
                )
                for j in cells
            ),
            strict=True,
        )
    ] or [0] * 9
    longest = max((j.longest_pause_seconds for j in cells), default=0.0)
    return (
        f"all {len(cells)} cells",
        *map(str, sums),
        f"{longest:.1f}",
        "passed" if report.passed else "FAILED",
    )


def print_report(console: Console, report: MatrixReport, *, with_logs: bool = False) -> None:
    """The table, and below it why cells have failed."""
    table = Table(title="Kill matrix", title_justify="left")
    for number, column in enumerate(COLUMNS):
        table.add_column(column, justify="left" if number == 0 else "right", no_wrap=number == 0)
    for judgement in report.judgements:
        table.add_row(*row(judgement), style="" if judgement.passed else "bold red")
    table.add_section()
    table.add_row(*total(report), style="bold")
    console.print(table)
    for judgement in report.judgements:
        for problem in judgement.problems[:12]:
            console.print(f"[red]{judgement.cell}[/red]: {problem}", highlight=False, markup=True, soft_wrap=True)
        if with_logs:
            for line in judgement.log_excerpt:
                console.print(f"    {line}", highlight=False, markup=False, soft_wrap=True)
    for remains in report.left_behind:
        console.print(f"[red]left behind[/red]: {remains}")
    minutes = report.seconds / 60
    console.print(
        f"{minutes:.1f} min, pauses of {report.options.pause_seconds:g} s, seed {report.options.seed}; "
        "the trainer takes no part in a generation and so is in no row",
        highlight=False,
    )


def as_markdown(report: MatrixReport) -> str:
    """The table for a page."""
    lines = [f"| {' | '.join(COLUMNS)} |", f"|{'|'.join(['---'] + ['--:'] * (len(COLUMNS) - 1))}|"]
    lines += [f"| {' | '.join(row(judgement))} |" for judgement in report.judgements]
    lines.append(f"| {' | '.join(f'**{value}**' for value in total(report))} |")
    return "\n".join(lines) + "\n"


def write_files(report: MatrixReport, json_path: Path | None, markdown_path: Path | None) -> None:
    """Writes what was asked for."""
    if json_path is not None:
        json_path.write_text(json.dumps(report.as_dict(), indent=1) + "\n", encoding="utf-8")
    if markdown_path is not None:
        markdown_path.write_text(as_markdown(report), encoding="utf-8")
