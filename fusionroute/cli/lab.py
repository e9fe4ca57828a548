"""`fusionroute lab`: the tiny trained family of models that shows the method on a laptop."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import click

from fusionroute.cli.group import CommandGroup, Failure
from fusionroute.cli.target import json_option

if TYPE_CHECKING:
    from trainer.lab_family import Family

SIZES = ("demo", "full")

lab = CommandGroup(
    name="lab",
    commands_at={"build": "fusionroute.cli.lab:build"},
    help="""Tiny models of our own: a base, three experts and a router.

    \b
    Example:
      fusionroute lab build
    """,
)


@click.command("build")
@click.option("--size", type=click.Choice(SIZES), default="demo", show_default=True, help="How large.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Of weights and data.")
@click.option("--output", type=click.Path(path_type=Path), metavar="DIR",
              help="Copy the family there too; the folder must not exist yet.")  # fmt: skip
@json_option
def build(size: str, seed: int, output: Path | None, as_json: bool) -> None:
    """Train the family, or find it in the cache ($FUSIONROUTE_CACHE_DIR, else ~/.cache/fusionroute).

    \b
    Example:
      fusionroute lab build --size demo --output models/lab
    """
    if output is not None and output.exists():
        raise Failure(f"--output {output} exists already")
    family = build_family(size, seed)
    folder, experts, router = family.folder, family.experts, family.router
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        draft = output.with_name(f".{output.name}.draft")
        shutil.rmtree(draft, ignore_errors=True)
        shutil.copytree(folder, draft)
        draft.rename(output)
        experts = {slot: output / path.relative_to(folder) for slot, path in experts.items()}
        router, folder = output / router.relative_to(folder), output
    if as_json:
        paths = {slot: str(path) for slot, path in experts.items()}
        click.echo(json.dumps({"folder": str(folder), "router": str(router), "experts": paths}, indent=2))
        return
    for slot, path in experts.items():
        click.echo(f"expert {slot:<10} {path}")
    click.echo(f"router            {router}")


def build_family(size: str, seed: int = 0) -> Family:
    """The family of this size, trained now or from the cache, with progress bars on standard error.

    Raises:
        Failure: someone else is building it and does not finish, or training failed.
    """
    from trainer.lab_family import FamilyIsBusy, shown
    from trainer.lab_family import build as build_or_find
    from trainer.lab_family.workers import WorkerFailed

    try:
        with shown() as progress:
            return build_or_find(size, seed, progress=progress)
    except (FamilyIsBusy, WorkerFailed, OSError) as error:
        raise Failure(f"the lab family of size {size!r} cannot be built: {error}") from None
