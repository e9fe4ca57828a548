"""`fusionroute bench speculation | wire`: ways to the same rows and texts, against the plain one."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fusionroute.cli.bench_parts import Asked, Progress, suite
from fusionroute.cli.bench_stacks import Models, lab_models, measure, random_models, threads_of

if TYPE_CHECKING:
    from evaluation.bench_report import Report
    from evaluation.bench_served import ServedStack
    from evaluation.bench_speculation import Outcome, Workload

ROUTER_SHARE = 4
"""How many times the router's layers the deeper experts have."""
QUARTER_GAIN = 1.3
TURNS = 12
"""One after the other, where answers end by themselves: they are short."""


@suite(shape="h128", tokens=64)
def speculation(asked: Asked) -> Report:
    """Every drafter and the automatic choice against the plain loop, on several workloads.

    The trained family as it is, the same with experts of four times the router's layers, and random weights of a
    --shape, where nearly every draft is wrong.

    \b
    Example:
      fusionroute bench speculation --output speculation.json --plot speculation.png
    """
    from evaluation.bench_machine import machine
    from evaluation.bench_report import Report
    from evaluation.bench_speculation import NUM_WARMUPS, findings, panel, table

    threads = threads_of(asked.threads, 4)
    before = machine(threads)
    outcomes: list[Outcome] = []
    with ExitStack() as made:
        trained = lab_models(asked.lab)
        outcomes += _outcomes(asked, trained, threads, _trained_workloads(asked, trained))
        outcomes += _outcomes(asked, *_deepened(made, asked, trained, threads))
        if asked.shape is not None:
            random = made.enter_context(random_models(asked.shape, asked.dtypes[0]))
            outcomes += _outcomes(asked, random, threads, _random_workloads(asked, random))
    return Report(
        suite="speculation",
        question="Does drafting pay, and is it harmless where it does not?",
        configuration={**before, "lab": asked.lab, "random_shape": asked.shape, "new_tokens": asked.num_tokens,
                       "runs": asked.num_runs, "warmups": NUM_WARMUPS, "combine": "sum"},
        findings=[each for outcome in outcomes for each in findings(outcome)],
        tables=[table(outcome) for outcome in outcomes],
        panels=[panel(outcome) for outcome in outcomes],
        notes=["'plain' is a stack whose router neither drafts nor asks experts early; all others may ask early.",
               "Tokens per round: those accepted and the one that follows them, of rounds that checked a draft."],
        runs={outcome.workload.name: outcome.runs for outcome in outcomes},
    )  # fmt: skip


def _outcomes(asked: Asked, served: Models, threads: int, workloads: Sequence[Workload]) -> list[Outcome]:
    """All workloads of one family, in a plain stack and one that may draft."""
    from evaluation.bench_speculation import measure_workload

    async def work(stacks: Sequence[ServedStack]) -> list[Outcome]:
        return [
            await measure_workload(
                stacks[0], stacks[1], workload, num_runs=asked.num_runs, on_run=Progress(f"{workload.name}: ")
            )
            for workload in workloads
        ]

    return measure([served.plain(), served], threads, work)


def _trained_workloads(asked: Asked, served: Models) -> list[Workload]:
    from evaluation.bench_speculation import Workload

    answers: dict[str, Any] = {"num_tokens": asked.num_tokens, "ignore_eos": False, "turns_per_session": TURNS}
    return [
        Workload("trained family, greedy", served.prompts, **answers),
        Workload("trained family, temperature 0.7", served.prompts, temperature=0.7, **answers),
        Workload("trained family, 16 sessions", served.prompts, num_sessions=16, **answers | {"turns_per_session": 3}),
        Workload("trained family past its end, repetitive", served.prompts, num_tokens=asked.num_tokens),
    ]


def _random_workloads(asked: Asked, served: Models) -> list[Workload]:
    from evaluation.bench_speculation import Workload

    def short(number: int) -> Sequence[int]:
        return served.prompts(number)[:16]

    tokens = asked.num_tokens
    return [
        Workload("random weights, greedy: router and expert disagree", short, tokens),
        Workload("random weights, greedy over 8 words: lookup is misled", short, tokens, num_words=8),
        Workload("random weights, temperature 2: the noise decides", short, tokens, temperature=2.0),
        Workload("random weights, greedy, 16 sessions", short, tokens, num_sessions=16),
    ]


def _deepened(
    made: ExitStack, asked: Asked, trained: Models, threads: int
) -> tuple[Models, int, list[Workload]]:
    """The trained family with deeper experts, and what it writes."""
    from evaluation.bench_deepened import write_deepened
    from evaluation.bench_speculation import Workload

    folder = made.enter_context(tempfile.TemporaryDirectory(prefix="fusionroute-bench-"))
    deep = write_deepened(Path(folder), trained.router, trained.experts, ROUTER_SHARE)
    experts = {slot: str(path) for slot, path in deep.experts.items()}
    served = Models(str(deep.router), experts, trained.prompts, is_tiny=True)
    workload = Workload(
        "trained family, router a quarter of an expert", trained.prompts, num_tokens=asked.num_tokens,
        turns_per_session=TURNS, ignore_eos=False, least_auto=QUARTER_GAIN,
    )  # fmt: skip
    return served, threads, [workload]


@suite(shape="row128k", dtypes=("float32", "bfloat16"), tokens=8)
@click.option("--steps", type=click.IntRange(5, 1000), default=50, show_default=True,
              help="Round trips of each run.")  # fmt: skip
def wire(asked: Asked, steps: int) -> Report:
    """Milliseconds and bytes of one logits row between two processes: unary, stream, shared memory, short reply.

    row128k is a model with the vocabulary of h512 and almost no forward.

    \b
    Example:
      fusionroute bench wire --runs 9 --output wire.json --plot wire.png
    """
    from evaluation.bench_wire import measure_wire

    if asked.shape is None:
        raise click.UsageError("--shape none is not allowed: rows of the trained family are too short")
    with ExitStack() as made:
        served = [
            made.enter_context(random_models(asked.shape, dtype, num_experts=1)) for dtype in asked.dtypes
        ]
        threads = threads_of(asked.threads, 2)

        async def work(stacks: Sequence[ServedStack]) -> Report:
            return await measure_wire(
                dict(zip(asked.dtypes, stacks, strict=True)), list(served[0].prompts(0))[:8],
                num_runs=asked.num_runs, threads=threads, steps=steps, on_run=Progress(),
            )  # fmt: skip

        return measure(served, threads, work)
