"""`fusionroute bench http`: the router's HTTP beside its gRPC."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import click

from fusionroute.cli.bench_parts import Asked, Progress, suite
from fusionroute.cli.bench_stacks import measure, random_models, threads_of

if TYPE_CHECKING:
    from evaluation.bench_report import Report


@suite(shape="h32", tokens=64, runs=15)
@click.option("--sessions", multiple=True, type=click.IntRange(1, 64), default=(1, 8), show_default=True,
              help="How many at a time; give several.")  # fmt: skip
def http(asked: Asked, sessions: tuple[int, ...]) -> Report:
    """Time to first byte and per token over HTTP (/v1/completions, /generate_stream) and gRPC, from one router.

    The smallest models, so that what is around the forwards shows best. Needs a --shape.

    \b
    Example:
      fusionroute bench http --runs 9 --output http.json --plot http.png
    """
    from evaluation.bench_http import measure_http
    from evaluation.bench_shapes import SHAPES

    if asked.shape is None:
        raise click.UsageError("--shape none is not allowed: answers of the trained family are too short")
    width = SHAPES[asked.shape].vocabulary
    with random_models(asked.shape, asked.dtypes[0]) as made:
        served = replace(made, http_port=0)
        threads = threads_of(asked.threads, 1 + len(served.experts))
        return measure(
            [served], threads,
            lambda stacks: measure_http(
                stacks[0], lambda number: f"w{2 + (7 * number + 3) % (width - 2)}",
                num_tokens=asked.num_tokens, num_runs=asked.num_runs, threads=threads,
                sessions=sorted(set(sessions)), on_run=Progress(),
            ),
        )  # fmt: skip
