"""`fusionroute bench`: how fast, measured in one run on this machine."""

from __future__ import annotations

import asyncio
import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click

from fusionroute.cli.group import CommandGroup
from fusionroute.cli.target import json_option

if TYPE_CHECKING:
    from evaluation.bench_decode import Report
    from fusionroute.local_stack import StackPlan

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
    "--shape",
    type=click.Choice(("h512", "h128")),
    help="Random weights of this size instead: h512 = hidden 512, 8 layers, vocabulary 128,256.",
)
@click.option(
    "--dtype",
    type=click.Choice(("float32", "bfloat16", "float16")),
    default="float32",
    show_default=True,
    help="Number format of --shape.",
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
    lab: str,
    shape: str | None,
    dtype: str,
    num_tokens: int,
    num_runs: int,
    threads: int,
    output: Path | None,
    as_json: bool,
) -> None:
    """Milliseconds per token: one model, a fused reference in one process, the served stack, and its parts.

    The models are those of `fusionroute lab build`, or of a --shape with random weights; the stack is started
    for the occasion and stopped again.

    \b
    Example:
      fusionroute bench decode --lab demo --runs 9 --output decode.json
      fusionroute bench decode --shape h512 --dtype bfloat16 --threads 2
    """
    from fusionroute.cli.stack import temporary_stack
    from fusionroute.local_stack import StackPlan, threads_for

    with _models(lab, shape, dtype) as (router, experts, prompt_ids):
        threads = threads or threads_for(1 + len(experts))
        plan = StackPlan(router, experts, port=0, threads=threads, isolated=True)
        with temporary_stack(plan) as (state, _):
            report = asyncio.run(
                _measure(state.router_address, plan, prompt_ids, num_tokens, num_runs, threads)
            )
    text = json.dumps(report.to_json(), indent=2)
    if output is not None:
        output.write_text(text + "\n")
    if as_json:
        click.echo(text)
    else:
        _print(report)


@contextmanager
def _models(
    lab: str, shape: str | None, dtype: str
) -> Iterator[tuple[str, Mapping[str, str], Sequence[int]]]:
    """Router checkpoint, experts by slot and prompt ids; random models are deleted afterwards."""
    if shape is None:
        from fusionroute.cli.lab import build_family
        from fusionroute.vocabulary import load_tokenizer

        family = build_family(lab)
        experts = {slot: str(path) for slot, path in family.experts.items()}
        yield str(family.router), experts, load_tokenizer(str(family.router))(PROMPT)["input_ids"]
        return
    from evaluation.bench_shapes import SHAPES, prompt, write_family

    with tempfile.TemporaryDirectory(prefix="fusionroute-bench-") as folder:
        click.echo(f"writing four random models of shape {shape}", err=True)
        random = write_family(Path(folder), SHAPES[shape], dtype)
        experts = {slot: str(path) for slot, path in random.experts.items()}
        yield str(random.router), experts, prompt(SHAPES[shape])


async def _measure(
    address: str,
    plan: StackPlan,
    prompt_ids: Sequence[int],
    num_tokens: int,
    num_runs: int,
    threads: int,
) -> Report:
    from evaluation.bench_decode import measure
    from fusionroute.client import RouterClient

    async with RouterClient.open(address) as router:
        return await measure(
            router, plan.router_checkpoint, plan.experts, prompt_ids,
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
