"""`fusionroute models`: what is done to model folders themselves, without serving or training them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click

from fusionroute.cli.group import CommandGroup
from fusionroute.cli.target import json_option

if TYPE_CHECKING:
    from trainer.merging import MergeProgress

METHODS = ("average", "task", "dare", "ties")

models = CommandGroup(
    name="models",
    commands_at={"merge": "fusionroute.cli.model_folders:merge"},
    help="""Model folders: merge several into one.

    \b
    Example:
      fusionroute models merge --method ties --base models/base models/math models/code --output models/merged
    """,
)


@click.command("merge")
@click.argument("folders", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="MODEL...")
@click.option("--method", type=click.Choice(METHODS), default="average", show_default=True,
              help="average: weighted mean. task: base plus scaled differences from it. dare: differences with a "
                   "random part dropped. ties: differences trimmed, and only those of the elected sign.")  # fmt: skip
@click.option("--output", required=True, type=click.Path(path_type=Path), metavar="DIR",
              help="Folder of the merged model; must not exist yet.")  # fmt: skip
@click.option("--base", type=click.Path(path_type=Path), metavar="DIR",
              help="The model from which all were trained; needed by all methods but average.")  # fmt: skip
@click.option("--scale", "scales", type=float, multiple=True, metavar="S",
              help="Weight of each model: once for all, or once per model in their order. [default: 1]")  # fmt: skip
@click.option("--drop-rate", type=float, default=0.5, show_default=True, help="dare: share that is dropped.")
@click.option("--density", type=float, default=0.2, show_default=True, help="ties: share that is kept.")
@click.option(
    "--seed", type=click.IntRange(0), default=0, show_default=True, help="dare: of what is dropped."
)
@json_option
def merge(
    folders: tuple[Path, ...],
    method: str,
    output: Path,
    base: Path | None,
    scales: tuple[float, ...],
    drop_rate: float,
    density: float,
    seed: int,
    as_json: bool,
) -> None:
    """Merge models of one architecture and vocabulary into a new one, without training.

    Memory does not grow with the models. Configuration and tokenizer are those of the first MODEL.

    \b
    Example:
      fusionroute models merge --method task --scale 0.5 --base models/base models/math models/code --output merged
    """
    from trainer.merging import MERGE_FILE, MergeMethod, MergeSettings
    from trainer.merging import merge as merge_folders

    settings = MergeSettings(MergeMethod(method), scales or (1.0,), drop_rate, density, seed)
    with _bar() as report:
        merged = merge_folders(folders, output, settings, base, report)
    if as_json:
        facts = json.loads((merged / MERGE_FILE).read_text(encoding="utf-8"))
        click.echo(json.dumps({"folder": str(merged), **facts}, indent=2))
        return
    click.echo(str(merged))


@contextmanager
def _bar() -> Iterator[Callable[[MergeProgress], None]]:
    """Progress on standard error where that is a terminal."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    from fusionroute.cli.console import console

    screen = console(stderr=True)
    columns = (
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        TimeRemainingColumn(),
        TextColumn("{task.description}"),
    )
    with Progress(*columns, console=screen, disable=not screen.is_terminal, transient=True) as bars:
        task = bars.add_task("reading headers", total=None)

        def report(progress: MergeProgress) -> None:
            bars.update(task, total=progress.total, completed=progress.done, description=progress.tensor)

        yield report
