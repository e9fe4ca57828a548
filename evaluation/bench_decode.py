"""How long a token takes: one model by `generate`, the fused loop in one process, the served stack plain and drafted.

The served stack also says where its time goes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from evaluation.bench_machine import machine, sizes
from evaluation.bench_reference import CachedFusion, generate_with_one, load_causal_lm
from evaluation.bench_report import Bars, Cell, Finding, Report, Stacks, Table, speed_table
from evaluation.bench_runs import NUM_WARMUPS, OnRun, Runs, Spread, Way, ratio, take_turns
from evaluation.bench_served import ServedStack, ServedTurn, request_for
from fusionroute.v1.router_pb2 import Drafting, GenerationStatistics

ALONE = "HF generate, one expert"
REFERENCE = "fused in one process, cached"
PLAIN = "served, plain"
EARLY = "served, asked early"
DRAFTED = "served, drafted too"
NUM_CHECKED = 2
"""Rounds whose texts with early asks are written again in one process."""

Prompts = Callable[[int], Sequence[int]]
"""The prompt of a number; prompts of different numbers share little."""


async def measure_decode(
    plain: ServedStack,
    stack: ServedStack,
    prompts: Prompts,
    *,
    num_tokens: int,
    num_runs: int,
    threads: int,
    is_tiny: bool = False,
    on_run: OnRun = lambda done, total: None,
) -> Report:
    """Measures all ways on the same prompts, another prompt in each round.

    Args:
        plain: whose router neither drafts nor asks experts early.
        stack: the same models behind a router that may do both.
        num_tokens: new tokens of each run.
        num_runs: measured rounds.
        threads: of torch in this process; give the services as many.
        is_tiny: whether forwards take so little that the aim is about the loop in one process.
    """
    import torch

    torch.set_num_threads(threads)
    fusion = CachedFusion.load(stack.checkpoint, stack.experts)
    slot, folder = next(iter(stack.experts.items()))
    single = load_causal_lm(folder)
    served_ways = (PLAIN, EARLY, DRAFTED)
    answers: dict[str, list[list[int]]] = {name: [] for name in (REFERENCE, *served_ways)}
    turns: dict[str, list[ServedTurn]] = {name: [] for name in served_ways}

    # The two ways in this process hold up its event loop, on which nothing else runs meanwhile.
    async def alone(number: int) -> int:
        return len(generate_with_one(single, prompts(number), num_tokens))

    async def reference(number: int) -> int:
        answers[REFERENCE].append(fusion.generate(prompts(number), num_tokens))
        return num_tokens

    def served(name: str, asked: ServedStack, drafting: Drafting.ValueType, first: int = 0) -> Way:
        async def way(number: int) -> int:
            turn = await asked.turn(request_for(prompts(first + number), num_tokens, drafting=drafting))
            answers[name].append(turn.ids)
            turns[name].append(turn)
            return len(turn.ids)

        return way

    num_rounds = NUM_WARMUPS + num_runs

    async def tidy() -> None:
        await plain.tidy()
        await stack.tidy()

    runs = await take_turns(
        {
            ALONE: alone,
            REFERENCE: reference,
            PLAIN: served(PLAIN, plain, Drafting.DRAFTING_OFF),
            EARLY: served(EARLY, stack, Drafting.DRAFTING_OFF, num_rounds),
            DRAFTED: served(DRAFTED, stack, Drafting.DRAFTING_AUTO),
        },
        num_runs=num_runs, pids=[*plain.all_pids, *stack.all_pids], tidy=tidy, on_run=on_run,
    )  # fmt: skip
    early_ids = [fusion.generate(prompts(num_rounds + number), num_tokens) for number in range(NUM_CHECKED)]
    same = {
        "served plain ids equal to those of the loop in one process": (answers[PLAIN], answers[REFERENCE]),
        "ids with early asks equal to those of the loop in one process": (
            answers[EARLY][:NUM_CHECKED],
            early_ids,
        ),
        "ids with drafts equal to plain ids": (answers[DRAFTED], answers[PLAIN]),
    }
    measured = {name: [turn.statistics for turn in turns[name][NUM_WARMUPS:]] for name in served_ways}
    parts = {name: shares(of_way, num_tokens) for name, of_way in measured.items()}
    return Report(
        suite="decode",
        question="How long does a fused token take, and where does its time go?",
        configuration={
            **machine(threads), **sizes(folder), "experts": len(stack.experts), "expert_alone": slot,
            "prompt_tokens": len(prompts(0)), "new_tokens": num_tokens, "runs": num_runs, "warmups": NUM_WARMUPS,
            "combine": "sum", "greedy": True,
        },
        findings=[
            *_findings(runs, measured[PLAIN], is_tiny=is_tiny),
            *(Finding(what, equal_share(*pair)) for what, pair in same.items()),
        ],
        tables=(speed_table("One session", runs), _parts_table(parts)),
        panels=(
            Bars("One session, whole turns", "ms per token",
                 {name: Spread.of(each.ms_per_token) for name, each in runs.items()}),
            Stacks("Where a token's time goes", "ms per token",
                   {name: {part: value for part, value in of_way.items() if part != "total"}
                    for name, of_way in parts.items()}),
        ),
        notes=(
            "'asked early': the last token's expert is asked before the router has routed, where that pays; 'drafted"
            " too': tokens are also drafted where that pays. Neither is done in 'plain'.",
            "Every round has another prompt, which no stack has seen before; prefill is included everywhere.",
            "'hand-over' is waiting for the router's own engine beyond its forwards, 'wire' for an expert beyond its.",
        ),
        runs={"decode": runs},
    )  # fmt: skip


def _findings(
    runs: Mapping[str, Runs],
    plain: Sequence[GenerationStatistics],
    *,
    is_tiny: bool,
) -> list[Finding]:
    forwards = [each.router_forward_seconds + each.expert_forward_seconds for each in plain]
    return [
        Finding(
            "served plain step / (router forward + expert forward)",
            ratio((each.total_seconds for each in plain), forwards),
            at_most=None if is_tiny else 1.05,
        ),
        Finding(
            "served plain / fused in one process",
            ratio(runs[PLAIN].ms_per_token, runs[REFERENCE].ms_per_token),
            at_most=1.25 if is_tiny else None,
        ),
        Finding(
            "served plain, CPU / fused in one process, CPU",
            ratio(runs[PLAIN].cpu_ms_per_token, runs[REFERENCE].cpu_ms_per_token),
        ),
        Finding(
            "tokens / s of served with all of it / of HF generate, one expert",
            ratio(runs[ALONE].ms_per_token, runs[DRAFTED].ms_per_token),
            at_least=1.0,
        ),
    ]


def equal_share(some: Sequence[Sequence[int]], others: Sequence[Sequence[int]]) -> Spread:
    """Of the ids of each answer, those up to the first that differs; 1 where all are equal."""
    return Spread.of(_equal_beginning(a, b) for a, b in zip(some, others, strict=True))


def _equal_beginning(a: Sequence[int], b: Sequence[int]) -> float:
    length = max(len(a), len(b))
    pairs = zip(a, b, strict=False)
    return next((place for place, (x, y) in enumerate(pairs) if x != y), min(len(a), len(b))) / length


def shares(turns: Sequence[GenerationStatistics], num_tokens: int) -> dict[str, float]:
    """Milliseconds per token by where they went, of the turn with the median total.

    "hand-over" is what waiting for the router's engine took beyond its forwards: queue and threads; "wire" what waiting
    for experts took beyond theirs: queue, serialising, sockets. "rest" is what the router's total holds beyond all
    parts; below zero where parts ran side by side.
    """
    turn = sorted(turns, key=lambda each: each.total_seconds)[len(turns) // 2]
    parts = {
        "router forward": turn.router_forward_seconds,
        "hand-over": turn.router_seconds - turn.router_forward_seconds,
        "expert forward": turn.expert_forward_seconds,
        "wire": turn.expert_seconds - turn.expert_forward_seconds,
        "fuse": turn.fuse_seconds,
        "redis": turn.store_seconds,
    }
    parts["rest"] = turn.total_seconds - sum(parts.values())
    parts["total"] = turn.total_seconds
    return {name: 1000 * seconds / num_tokens for name, seconds in parts.items()}


def _parts_table(parts: Mapping[str, Mapping[str, float]]) -> Table:
    names = list(parts[PLAIN])
    rows: list[list[Cell]] = [[way, *(of_way[name] for name in names)] for way, of_way in parts.items()]
    return Table("Served, ms per token by part (median turn)", ("way", *names), rows)
