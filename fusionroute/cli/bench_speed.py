"""`fusionroute bench decode | throughput | experts | rules`: how long tokens take, one and many at a time."""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING

import click

from fusionroute.cli.bench_parts import Asked, Progress, suite
from fusionroute.cli.bench_stacks import lab_models, measure, models, random_models, threads_of

if TYPE_CHECKING:
    from evaluation.bench_report import Report


@suite(runs=7)
def decode(asked: Asked) -> Report:
    """Milliseconds per token: one model, a fused loop in one process, the served stack, and its parts.

    The models are those of `fusionroute lab build`, or of a --shape with random weights; the stack is started
    for the occasion and stopped again.

    \b
    Example:
      fusionroute bench decode --lab demo --runs 9 --output decode.json
      fusionroute bench decode --shape h512 --dtype bfloat16 --threads 2 --plot decode.png
    """
    from evaluation.bench_decode import measure_decode

    with models(asked.lab, asked.shape, asked.dtypes[0]) as made:
        threads = threads_of(asked.threads, 1 + len(made.experts))
        return measure(
            [made.plain(), made], threads,
            lambda stacks: measure_decode(
                stacks[0], stacks[1], made.prompts, num_tokens=asked.num_tokens, num_runs=asked.num_runs,
                threads=threads, is_tiny=made.is_tiny, on_run=Progress(),
            ),
        )  # fmt: skip


@suite(shape="h128", dtypes=("float32", "bfloat16"), tokens=16)
@click.option("--sessions", multiple=True, type=click.IntRange(1, 256), default=(1, 4, 16, 64), show_default=True,
              help="How many at a time; give several.")  # fmt: skip
def throughput(asked: Asked, sessions: tuple[int, ...]) -> Report:
    """Tokens per second of 1, 4, 16 and 64 sessions, each number format, routed and with one expert for all.

    \b
    Example:
      fusionroute bench throughput --shape h512 --threads 1 --output throughput.json
    """
    from evaluation.bench_throughput import measure_throughput

    with ExitStack() as made:
        dtypes = asked.dtypes if asked.shape else ("float32",)
        served = [made.enter_context(models(asked.lab, asked.shape, dtype)).plain() for dtype in dtypes]
        threads = threads_of(asked.threads, 1 + len(served[0].experts))
        return measure(
            served, threads,
            lambda stacks: measure_throughput(
                dict(zip(dtypes, stacks, strict=True)), served[0].prompts, num_tokens=asked.num_tokens,
                num_runs=asked.num_runs, threads=threads, sessions=sorted(set(sessions)), on_run=Progress(),
            ),
        )  # fmt: skip


@suite(shape="h128", tokens=96)
@click.option("--experts", "counts", multiple=True, type=click.IntRange(2, 32), default=(2, 4, 8), show_default=True,
              help="How many; give several.")  # fmt: skip
def experts(asked: Asked, counts: tuple[int, ...]) -> Report:
    """Milliseconds per token with 2, 4 and 8 experts. Needs a --shape.

    \b
    Example:
      fusionroute bench experts --runs 9 --plot experts.png
    """
    from evaluation.bench_experts import measure_experts

    if asked.shape is None:
        raise click.UsageError("--shape none is not allowed: the trained family has three experts")
    counts = tuple(sorted(set(counts)))
    with ExitStack() as made:
        served = [
            made.enter_context(random_models(asked.shape, asked.dtypes[0], num_experts=count)).plain()
            for count in counts
        ]
        threads = threads_of(asked.threads, 1 + max(counts))
        return measure(
            served, threads,
            lambda stacks: measure_experts(
                dict(zip(counts, stacks, strict=True)), served[0].prompts, num_tokens=asked.num_tokens,
                num_runs=asked.num_runs, threads=threads, on_run=Progress(),
            ),
        )  # fmt: skip


@suite(tokens=48)
@click.option("--prompts", "prompts_per_run", type=click.IntRange(1, 64), default=6, show_default=True,
              help="Turns of each run, one after the other.")  # fmt: skip
def rules(asked: Asked, prompts_per_run: int) -> Report:
    """Expert calls per token and tokens per second of sum, gated_sum, mixture and select, on the same prompts.

    The trained family is that of phase I, whose router serves every rule; its answers end where they end.

    \b
    Example:
      fusionroute bench rules --output rules.json --plot rules.png
    """
    from evaluation.bench_rules import measure_rules

    is_trained = asked.shape is None
    with ExitStack() as made:
        if asked.shape is None:
            served = lab_models(asked.lab, phase_one=True).plain()
        else:
            served = made.enter_context(random_models(asked.shape, asked.dtypes[0], with_gates=True)).plain()
        threads = threads_of(asked.threads, 1 + len(served.experts))
        return measure(
            [served], threads,
            lambda stacks: measure_rules(
                stacks[0], served.prompts, num_tokens=asked.num_tokens, num_runs=asked.num_runs, threads=threads,
                prompts_per_run=prompts_per_run, ignore_eos=not is_trained, on_run=Progress(),
            ),
        )  # fmt: skip
