"""`fusionroute lab`: the tiny trained family of models that shows the method on a laptop."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fusionroute.cli.group import CommandGroup, Failure
from fusionroute.cli.target import json_option

if TYPE_CHECKING:
    from trainer.lab_family import Family

SIZES = ("demo", "full")
VARIANTS_FOLDER = "variants"

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
@click.option("--seed", "--seeds", "seeds", default="0", show_default=True, metavar="N,...",
              help="Of weights and data; several make several families.")  # fmt: skip
@click.option("--variants", "names", default="", metavar="NAME,...",
              help="What the evaluation compares with, for each family: names, or all.")  # fmt: skip
@click.option("--processes", type=click.IntRange(1), default=2, show_default=True, help="Worker processes.")
@click.option("--output", type=click.Path(path_type=Path), metavar="DIR",
              help="Copy the family there too; the folder must not exist yet.")  # fmt: skip
@json_option
def build(size: str, seeds: str, names: str, processes: int, output: Path | None, as_json: bool) -> None:
    """Train the family, or find it in the cache ($FUSIONROUTE_CACHE_DIR, else ~/.cache/fusionroute).

    \b
    Example:
      fusionroute lab build --size demo --output models/lab
      fusionroute lab build --size full --seeds 1,2,3 --variants all
    """
    if output is not None and output.exists():
        raise Failure(f"--output {output} exists already")
    chosen = parse_seeds(seeds)
    if output is not None and len(chosen) > 1:
        raise click.UsageError("--output takes one family; leave it out, or give one seed")
    families = build_families(size, chosen, parse_variants(names), processes)
    facts = [_facts(family, output) for family in families]
    if output is not None:
        _copy(families[0], output)
    if as_json:
        click.echo(json.dumps(facts[0] if len(facts) == 1 else facts, indent=2))
        return
    for of_family in facts:
        if len(facts) > 1:
            click.echo(f"seed {of_family['seed']}")
        for slot, path in of_family["experts"].items():
            click.echo(f"expert {slot:<10} {path}")
        click.echo(f"router            {of_family['router']}")
        for name, path in of_family["variants"].items():
            click.echo(f"variant {name:<30} {path}")


def parse_seeds(text: str) -> list[int]:
    """Seeds of a text such as 1,2,3. Raises click.BadParameter."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() for part in parts) or len({int(part) for part in parts}) != len(parts):
        raise click.BadParameter(
            f"{text!r} is not a list of different whole numbers, for example 1,2,3", param_hint="--seeds"
        )
    return [int(part) for part in parts]


def parse_variants(text: str) -> tuple[str, ...]:
    """Names of variants of a text such as cdpo_bias0,merge_ties, or all of them. Raises click.BadParameter."""
    from trainer.lab_family.variants import VARIANTS

    names = (
        tuple(VARIANTS) if text == "all" else tuple(part.strip() for part in text.split(",") if part.strip())
    )
    for name in names:
        if name not in VARIANTS:
            raise click.BadParameter(
                f"{name!r} is not one of all, {', '.join(VARIANTS)}", param_hint="--variants"
            )
    return names


def _facts(family: Family, output: Path | None) -> dict[str, Any]:
    """Where everything is; in `output` if it has been copied there."""

    def place(path: Path) -> str:
        return str(path if output is None else output / path.relative_to(family.folder))

    variants = family.variants.items()
    return {
        "seed": family.facts["seed"],
        "folder": str(output or family.folder),
        "router": place(family.router),
        "experts": {slot: place(path) for slot, path in family.experts.items()},
        "variants": {
            name: str(path if output is None else output / VARIANTS_FOLDER / name) for name, path in variants
        },
    }


def _copy(family: Family, output: Path) -> None:
    output.parent.mkdir(parents=True, exist_ok=True)
    draft = output.with_name(f".{output.name}.draft")
    shutil.rmtree(draft, ignore_errors=True)
    shutil.copytree(family.folder, draft)
    for name, path in family.variants.items():
        shutil.copytree(path, draft / VARIANTS_FOLDER / name)
    draft.rename(output)


def build_families(
    size: str, seeds: Sequence[int], names: Sequence[str] = (), processes: int = 2
) -> list[Family]:
    """Families of one size with their variants, trained now or from the cache, with progress on standard error.

    Raises:
        Failure: someone else is building one of them and does not finish, or training failed.
    """
    from trainer.lab_family import FamilyIsBusy, build_all, shown
    from trainer.lab_family.workers import WorkerFailed

    try:
        with shown(one_bar=len(seeds) > 1 or len(names) > 0) as progress:
            return build_all(size, seeds, names, processes=processes, progress=progress)
    except (FamilyIsBusy, WorkerFailed, OSError) as error:
        raise Failure(f"the lab family of size {size!r} cannot be built: {error}") from None


def build_family(size: str, seed: int = 0) -> Family:
    """The family of this size, as `build_families`."""
    return build_families(size, [seed])[0]
