"""`fusionroute bench context | memory | prefix`: what sessions cost as they grow, stay and resemble each other."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from fusionroute.cli.bench_parts import Asked, Progress, suite
from fusionroute.cli.bench_stacks import measure, models, random_models, threads_of

if TYPE_CHECKING:
    from evaluation.bench_report import Report

KV_TOKENS = 2_000_000
"""For sessions that stay: memory must not run out while it is measured."""


@suite(shape="h128", tokens=1024)
def context(asked: Asked) -> Report:
    """Milliseconds per token by position, up to 1,024 new tokens, beside what attention alone takes there.

    \b
    Example:
      fusionroute bench context --tokens 1024 --plot context.png
    """
    from evaluation.bench_context import measure_context

    with models(asked.lab, asked.shape, asked.dtypes[0]) as made:
        served = made.plain()
        threads = threads_of(asked.threads, 1 + len(served.experts))
        return measure(
            [served], threads,
            lambda stacks: measure_context(
                stacks[0], served.prompts, num_tokens=asked.num_tokens, num_runs=asked.num_runs, threads=threads,
                on_run=Progress(),
            ),
        )  # fmt: skip


@suite(shape="h128", tokens=1000)
@click.option("--sessions", type=click.IntRange(1, 256), default=16, show_default=True,
              help="Of each block, between which memory is read.")  # fmt: skip
def memory(asked: Asked, sessions: int) -> Report:
    """Bytes that a session adds to router and expert, beside those of its keys and values. Needs a --shape.

    \b
    Example:
      fusionroute bench memory --shape h256 --tokens 1000 --output memory.json
    """
    from evaluation.bench_memory import measure_memory
    from evaluation.bench_shapes import SHAPES, prompt

    shape = _shape_of(asked)
    with random_models(shape, asked.dtypes[0], num_experts=1) as made:
        served = made.plain().with_variables(
            FUSIONROUTE_ROUTER_KV_TOKENS=str(KV_TOKENS), FUSIONROUTE_EXPERT_KV_TOKENS=str(KV_TOKENS)
        )
        threads = threads_of(asked.threads, 2)
        return measure(
            [served], threads,
            lambda stacks: measure_memory(
                stacks[0], lambda number, length: prompt(SHAPES[shape], length, number), num_tokens=asked.num_tokens,
                num_runs=asked.num_runs, threads=threads, sessions=sessions, on_run=Progress(),
            ),
        )  # fmt: skip


@suite(shape="h128", tokens=8)
@click.option("--prefix", "prefix_tokens", type=click.IntRange(16, 3900), default=1000, show_default=True,
              help="Tokens that prompts have in common.")  # fmt: skip
def prefix(asked: Asked, prefix_tokens: int) -> Report:
    """Time to the first token of a session whose prompt begins like an earlier one's. Needs a --shape.

    \b
    Example:
      fusionroute bench prefix --shape h512 --dtype bfloat16 --prefix 1000 --plot prefix.png
    """
    from evaluation.bench_prefix import measure_prefix
    from evaluation.bench_shapes import SHAPES, prompt

    shape = _shape_of(asked)
    with random_models(shape, asked.dtypes[0], num_experts=1) as made:
        served = made.plain()
        threads = threads_of(asked.threads, 2)
        return measure(
            [served], threads,
            lambda stacks: measure_prefix(
                stacks[0], lambda number, length: prompt(SHAPES[shape], length, number), prefix_tokens=prefix_tokens,
                num_tokens=asked.num_tokens, num_runs=asked.num_runs, threads=threads, on_run=Progress(),
            ),
        )  # fmt: skip


def _shape_of(asked: Asked) -> str:
    if asked.shape is None:
        raise click.UsageError("--shape none is not allowed: sessions of the trained family are too short")
    return asked.shape
