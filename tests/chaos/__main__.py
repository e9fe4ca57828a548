"""`python -m tests.chaos`: the kill matrix; `python -m tests.chaos swaps`: experts swapped under load."""

from __future__ import annotations

import asyncio
import tempfile
from functools import partial
from pathlib import Path

import click
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from tests.chaos.faults import MATRIX, Cell


@click.group(invoke_without_command=True)
@click.option("--cells", default="", help="Only these, with commas: router/kill,redis or */slow. Default: all.")
@click.option("--generations", default=288, show_default=True, help="In all, in equal shares.")
@click.option("--seed", default=7, show_default=True, help="Of prompts and sampling.")
@click.option("--pause-seconds", default=10.0, show_default=True, help="Length of SIGSTOP, slowness, partition.")
@click.option("--concurrent", default=6, show_default=True, help="Generations at a time.")
@click.option("--max-tokens", default=64, show_default=True, help="Of each generation.")
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Write all numbers there.")
@click.option("--markdown", "markdown_path", type=click.Path(path_type=Path), help="Write the table there.")
@click.option("--fork", is_flag=True, help="Start daemons by forking: quicker, less like life.")
@click.option("--logs", is_flag=True, help="Show what the processes warned of in cells that failed.")
@click.option("--keep", is_flag=True, help="Keep the folder with the logs.")
@click.pass_context
def main(
    context: click.Context,
    cells: str,
    generations: int,
    seed: int,
    pause_seconds: float,
    concurrent: int,
    max_tokens: int,
    json_path: Path | None,
    markdown_path: Path | None,
    fork: bool,
    logs: bool,
    keep: bool,
) -> None:
    """Hurts every part of a running stack in every way while it writes, and judges what its clients see.

    Exit code 1 when any cell fails.
    """
    if context.invoked_subcommand is not None:
        return
    from tests.chaos.matrix import MatrixOptions, MatrixReport, run_matrix
    from tests.chaos.report import print_report, write_files
    from tests.chaos.stack import StackSettings

    chosen = choose_cells(cells)
    options = MatrixOptions(chosen, generations, pause_seconds, concurrent, max_tokens, seed, StackSettings(forks=fork))
    console = Console(width=None if Console().is_terminal else 200)
    folder = Path(tempfile.mkdtemp(prefix="fr-chaos-"))

    def run() -> MatrixReport:
        with _progress() as progress:
            task = progress.add_task("starting", total=len(chosen) + 1)

            def on_cell(cell: Cell, judgement: object | None) -> None:
                progress.update(task, description=str(cell), advance=0 if judgement is None else 1)
                if judgement is not None and not progress.console.is_terminal:
                    progress.console.print(f"{cell}: {'passed' if judgement.passed else 'FAILED'}")  # type: ignore[attr-defined]

            return asyncio.run(run_matrix(options, folder, on_cell))

    report = run()
    print_report(console, report, with_logs=logs)
    write_files(report, json_path, markdown_path)
    _dispose(folder, keep, console)
    raise SystemExit(0 if report.passed else 1)


@main.command("swaps")
@click.option("--swaps", "num_swaps", default=20, show_default=True)
@click.option("--generations", default=200, show_default=True, help="At least.")
@click.option("--weights", type=click.Choice(["equal", "new", "both"]), default="both", show_default=True)
@click.option("--concurrent", default=8, show_default=True, help="Generations at a time.")
@click.option("--seed", default=7, show_default=True)
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Write all numbers there.")
def swaps(
    num_swaps: int, generations: int, weights: str, concurrent: int, seed: int, json_path: Path | None
) -> None:
    """Swap an expert again and again while generations run.

    Exit code 1 when any of them suffers.
    """
    import json

    from tests.chaos.swap_report import summary
    from tests.chaos.swaps import SwapOptions, run_swaps

    console, reports = Console(), []
    for new_weights in {"equal": [False], "new": [True], "both": [False, True]}[weights]:
        options = SwapOptions(num_swaps, generations, new_weights, concurrent, seed=seed)
        folder = Path(tempfile.mkdtemp(prefix="fr-chaos-"))
        with _progress() as progress:
            task = progress.add_task("new weights" if new_weights else "equal weights", total=num_swaps)
            on_swap = partial(_completed, progress, task)
            report = asyncio.run(run_swaps(options, folder, on_swap))
        for line in summary(report):
            console.print(line, highlight=False, markup=False, soft_wrap=True)
        reports.append(report)
        _dispose(folder, False, console)
    if json_path is not None:
        json_path.write_text(json.dumps([report.as_dict() for report in reports], indent=1) + "\n")
    raise SystemExit(0 if all(report.passed for report in reports) else 1)


def _completed(progress: Progress, task: TaskID, done: int) -> None:
    progress.update(task, completed=done)


def choose_cells(text: str) -> tuple[Cell, ...]:
    """The cells that a list of patterns means. Raises click.BadParameter."""
    if not text:
        return MATRIX
    chosen = []
    for pattern in text.split(","):
        found = [cell for cell in MATRIX if Path(cell.key).match(pattern) or cell.key.startswith(f"{pattern}/")]
        if not found:
            known = ", ".join(cell.key for cell in MATRIX)
            raise click.BadParameter(f"{pattern!r} is no cell; known: {known}", param_hint="--cells")
        chosen += [cell for cell in found if cell not in chosen]
    return tuple(chosen)


def _progress() -> Progress:
    return Progress(
        TextColumn("{task.description:>24}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=Console(stderr=True),
    )


def _dispose(folder: Path, keep: bool, console: Console) -> None:
    import shutil

    if keep:
        console.print(f"logs are in {folder}/stack")
    else:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
