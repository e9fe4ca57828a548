"""`fusionroute bench decode | throughput | experts | rules`: how long tokens take, one and many at a time."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fusionroute.cli.bench_parts import Asked, Progress, suite
from fusionroute.cli.bench_stacks import measure, models, threads_of

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
            [made], threads,
            lambda stacks: measure_decode(
                stacks[0], made.prompts, num_tokens=asked.num_tokens, num_runs=asked.num_runs, threads=threads,
                is_tiny=made.is_tiny, on_run=Progress(),
            ),
        )  # fmt: skip
