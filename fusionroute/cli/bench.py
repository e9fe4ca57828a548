"""`fusionroute bench`: how fast, measured in one run on this machine."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import click

from fusionroute.cli.group import CommandGroup
from fusionroute.cli.target import json_option

if TYPE_CHECKING:
    from evaluation.bench_decode import Report

PROMPT = "box: 4+4; rev jbef="

bench = CommandGroup(
    name="bench",
    commands_at={"decode": "fusionroute.cli.bench:decode"},
    help="""Measure speed on this machine.

    \b
    Example:
      fusionroute bench decode --lab demo
    """,
)


@click.command()
@click.option(
    "--lab",
    type=click.Choice(("demo", "full")),
    default="demo",
    show_default=True,
    help="Which trained family to run.",
)
@click.option(
    "--tokens",
    "num_tokens",
    type=click.IntRange(8, 400),
    default=64,
    show_default=True,
    help="New tokens of each run.",
)
@click.option(
    "--runs",
    "num_runs",
    type=click.IntRange(5),
    default=7,
    show_default=True,
    help="Measured runs of each way to decode; the median counts.",
)
@click.option(
    "--threads",
    type=click.IntRange(0),
    default=0,
    show_default=True,
    help="Torch threads of every process; 0 = the cores shared out.",
)
@click.option("--output", type=click.Path(dir_okay=False, path_type=Path), metavar="FILE",
              help="Write the JSON there too.")  # fmt: skip
@json_option
def decode(
    lab: str, num_tokens: int, num_runs: int, threads: int, output: Path | None, as_json: bool
) -> None:
    """Milliseconds per token: one model, a fused reference in one process, the served stack, and its parts.

    The models are those of `fusionroute lab build`; the stack is started for the occasion and stopped again.

    \b
    Example:
      fusionroute bench decode --lab demo --runs 9 --output decode.json
    """
    from fusionroute.cli.lab import build_family
    from fusionroute.cli.stack import temporary_stack
    from fusionroute.local_stack import StackPlan, threads_for

    family = build_family(lab)
    experts = {slot: str(path) for slot, path in family.experts.items()}
    threads = threads or threads_for(1 + len(experts))
    plan = StackPlan(str(family.router), experts, port=0, threads=threads, isolated=True)
    with temporary_stack(plan) as state:
        report = asyncio.run(
            _measure(state.router_address, plan.router_checkpoint, experts, num_tokens, num_runs, threads)
        )
    text = json.dumps(report.to_json(), indent=2)
    if output is not None:
        output.write_text(text + "\n")
    if as_json:
        click.echo(text)
    else:
        _print(report)


async def _measure(
    address: str, checkpoint: str, experts: Mapping[str, str], num_tokens: int, num_runs: int, threads: int
) -> Report:
    from evaluation.bench_decode import measure
    from fusionroute.client import RouterClient
    from fusionroute.vocabulary import load_tokenizer

    prompt_ids = load_tokenizer(checkpoint)(PROMPT)["input_ids"]
    async with RouterClient.open(address) as router:
        return await measure(
            router, checkpoint, experts, prompt_ids,
            num_tokens=num_tokens, num_runs=num_runs, threads=threads,
            on_run=lambda number: click.echo(f"run {number + 1} done", err=True),
        )  # fmt: skip


def _print(report: Report) -> None:
    from fusionroute.cli.console import console, table

    screen = console()
    told = ", ".join(f"{name} {value}" for name, value in report.configuration.items())
    screen.print(told, style="dim", markup=False)
    numbers = ("median", "min", "max")
    shown = table("ms per token", *numbers, right=numbers)
    for speed in report.speeds:
        shown.add_row(speed.name, f"{speed.median:.2f}", f"{min(speed.runs):.2f}", f"{max(speed.runs):.2f}")
    screen.print(shown)
    screen.print("\nserved, ms per token by part (median run):")
    for name, value in report.shares.items():
        screen.print(f"  {name:<16}{value:7.3f}", markup=False)
    same = f"{report.num_equal_ids} of {report.configuration['new_tokens']}"
    screen.print(f"\nserved ids equal to the reference: {same}")
