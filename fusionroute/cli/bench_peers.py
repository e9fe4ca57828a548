"""`fusionroute bench peers`: the served stack beside what others offer for the same models."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from fusionroute.cli.bench_parts import Asked, Progress, suite
from fusionroute.cli.bench_stacks import Models, measure, models, threads_of
from fusionroute.cli.group import Failure

if TYPE_CHECKING:
    from evaluation.bench_report import Report

NUM_TOKENS = 256
# by how much each prompt of random ids is shorter than the one before: batches of peers shall be ragged
SHORTER_TOKENS = 5


@suite(tokens=NUM_TOKENS)
@click.option(
    "--genlm-python", type=click.Path(exists=True, dir_okay=False, path_type=Path), metavar="FILE",
    help="Python of an environment that has genlm-control; else the one that --install-peers has made.",
)  # fmt: skip
@click.option(
    "--install-peers", is_flag=True,
    help="Make an environment with genlm-control from PyPI first, in the cache folder, unless it is there.",
)  # fmt: skip
@click.option(
    "--without-genlm", is_flag=True,
    help="Leave genlm-control out: for large vocabularies, where it takes minutes a run.",
)  # fmt: skip
@click.option(
    "--sessions", "num_sessions", type=click.IntRange(1, 64), multiple=True, default=(1, 8), show_default=True,
    help="Sessions at a time; may be given several times.",
)  # fmt: skip
def peers(
    asked: Asked,
    genlm_python: Path | None,
    install_peers: bool,
    without_genlm: bool,
    num_sessions: tuple[int, ...],
) -> Report:
    """Tokens per second: HF generate and assisted generation, proxy tuning, genlm-control, the served stack.

    All take turns on the same models and prompts, and their ids are compared. genlm-control runs in an environment of
    its own; where there is none it is reported as not measured. Without a cache of what it writes it needs minutes a
    run for large vocabularies.

    \b
    Example:
      fusionroute bench peers --install-peers --output peers.json --plot peers.png
      fusionroute bench peers --shape h512 --dtype bfloat16 --tokens 32 --without-genlm
    """
    from evaluation.peers.measure import HOW_TO_INSTALL, LEFT_OUT, Plan
    from evaluation.peers.measure import measure as measure_peers

    python = None if without_genlm else genlm_python or _found_python(install=install_peers)
    with (
        models(asked.lab, asked.shape, asked.dtypes[0]) as made,
        tempfile.TemporaryDirectory(prefix="fusionroute-peers-") as folder,
    ):
        threads = threads_of(asked.threads, 1 + len(made.experts))
        plan = Plan(
            prompts=_prompts(made, max(num_sessions), is_random=asked.shape is not None),
            num_tokens=asked.num_tokens,
            num_runs=asked.num_runs,
            threads=threads,
            log=Path(folder) / "genlm-control.log",
            genlm_python=python,
            without_genlm=LEFT_OUT if without_genlm else HOW_TO_INSTALL,
            num_sessions=sorted(set(num_sessions)),
        )
        return measure([made], threads, lambda stacks: measure_peers(stacks[0], plan, Progress()))


def _found_python(*, install: bool) -> Path | None:
    """The Python of the environment in the cache folder, made now if wanted."""
    from evaluation.peers import genlm_environment

    folder = genlm_environment.default_folder()
    if not install:
        return genlm_environment.installed_python(folder)
    click.echo(f"{genlm_environment.PACKAGE} {genlm_environment.VERSION} in {folder}", err=True)
    try:
        return genlm_environment.install(folder)
    except genlm_environment.InstallFailed as error:
        raise Failure(f"genlm-control cannot be installed: {error}") from error


def _prompts(made: Models, number: int, *, is_random: bool) -> list[Sequence[int]]:
    """Prompts of different lengths."""
    given = [made.prompts(each) for each in range(number)]
    if not is_random:
        return given
    return [each[: max(1, len(each) - SHORTER_TOKENS * place)] for place, each in enumerate(given)]
