"""How long a token takes: one model by `generate`, the fused loop in one process, the served stack plain and drafted.

The served stack also says where its time goes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from evaluation.bench_machine import machine, sizes
from evaluation.bench_reference import CachedFusion, generate_with_one, load_causal_lm
from evaluation.bench_report import Bars, Cell, Finding, Report, Stacks, Table, speed_table
from evaluation.bench_runs import NUM_WARMUPS, OnRun, Runs, Spread, Way, ratio, take_turns
from evaluation.bench_served import ServedStack, ServedTurn, request_for
from fusionroute.v1.router_pb2 import Drafting, GenerationStatistics

ALONE = "HF generate, one expert"
REFERENCE = "fused in one process, cached"
PLAIN = "served, plain"
EXACT = "served, exact"
EARLY = "served, asked early"
DRAFTED = "served, drafted too"
SERVED = (PLAIN, EXACT, EARLY, DRAFTED)
NUM_CHECKED = 2
"""Rounds whose texts of other prompts are written again in one process."""

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
    slot, folder = next(iter(stack.experts.items()))
    written = _Written(prompts, num_tokens, NUM_WARMUPS + num_runs)
    fusion = CachedFusion.load(stack.checkpoint, stack.experts)

    async def tidy() -> None:
        await plain.tidy()
        await stack.tidy()

    ways = written.ways_in_process(load_causal_lm(folder), fusion) | written.served_ways(plain, stack)
    pids = [*plain.all_pids, *stack.all_pids]
    runs = await take_turns(ways, num_runs=num_runs, pids=pids, tidy=tidy, on_run=on_run)
    configuration = {
        **machine(threads), **sizes(folder), "experts": len(stack.experts), "expert_alone": slot,
        "prompt_tokens": len(prompts(0)), "new_tokens": num_tokens, "runs": num_runs, "warmups": NUM_WARMUPS,
        "combine": "sum", "greedy": True,
    }  # fmt: skip
    same = written.findings_of_ids(fusion)
    return _report(configuration, runs, written.statistics(), num_tokens, same, is_tiny=is_tiny)


class _Written:
    """What each way writes, round by round."""

    def __init__(self, prompts: Prompts, num_tokens: int, num_rounds: int) -> None:
        self._prompts, self._num_tokens, self._num_rounds = prompts, num_tokens, num_rounds
        self._answers: dict[str, list[list[int]]] = {name: [] for name in (REFERENCE, *SERVED)}
        self._turns: dict[str, list[ServedTurn]] = {name: [] for name in SERVED}

    def ways_in_process(self, single: Any, fusion: CachedFusion) -> dict[str, Way]:
        """They hold up the event loop, on which nothing else runs meanwhile."""

        async def alone(number: int) -> int:
            return len(generate_with_one(single, self._prompts(number), self._num_tokens))

        async def reference(number: int) -> int:
            self._answers[REFERENCE].append(fusion.generate(self._prompts(number), self._num_tokens))
            return self._num_tokens

        return {ALONE: alone, REFERENCE: reference}

    def served_ways(self, plain: ServedStack, stack: ServedStack) -> dict[str, Way]:
        """No stack sees a prompt twice within its memory of prompts: each way but the plain ones has its own."""
        return {
            PLAIN: self._served(PLAIN, plain, 0),
            EXACT: self._served(EXACT, plain, 2 * self._num_rounds, exact=True),
            EARLY: self._served(EARLY, stack, self._num_rounds),
            DRAFTED: self._served(DRAFTED, stack, 0, Drafting.DRAFTING_AUTO),
        }

    def _served(
        self,
        name: str,
        asked: ServedStack,
        first: int,
        drafting: Drafting.ValueType = Drafting.DRAFTING_OFF,
        *,
        exact: bool = False,
    ) -> Way:
        async def way(number: int) -> int:
            request = request_for(self._prompts(first + number), self._num_tokens, drafting=drafting)
            request.exact = exact
            turn = await asked.turn(request)
            self._answers[name].append(turn.ids)
            self._turns[name].append(turn)
            return len(turn.ids)

        return way

    def statistics(self) -> dict[str, list[GenerationStatistics]]:
        """Of the measured turns, by served way."""
        return {
            name: [turn.statistics for turn in turns[NUM_WARMUPS:]] for name, turns in self._turns.items()
        }

    def findings_of_ids(self, fusion: CachedFusion) -> list[Finding]:
        """Texts are compared with those of the same prompts that another way has written, or writes now."""

        def again(first: int) -> list[list[int]]:
            numbers = range(first, first + NUM_CHECKED)
            return [fusion.generate(self._prompts(number), self._num_tokens) for number in numbers]

        written, loop = self._answers, "those of the loop in one process"
        same = {
            f"served plain ids equal to {loop}": (written[PLAIN], written[REFERENCE]),
            f"exact ids equal to {loop}": (written[EXACT][:NUM_CHECKED], again(2 * self._num_rounds)),
            f"ids with early asks equal to {loop}": (written[EARLY][:NUM_CHECKED], again(self._num_rounds)),
            "ids with drafts equal to plain ids": (written[DRAFTED], written[PLAIN]),
        }
        return [Finding(what, equal_share(*pair)) for what, pair in same.items()]


def _report(
    configuration: Mapping[str, Any],
    runs: Mapping[str, Runs],
    measured: Mapping[str, Sequence[GenerationStatistics]],
    num_tokens: int,
    same_ids: Sequence[Finding],
    *,
    is_tiny: bool,
) -> Report:
    parts = {name: shares(of_way, num_tokens) for name, of_way in measured.items()}
    return Report(
        suite="decode",
        question="How long does a fused token take, and where does its time go?",
        configuration=configuration,
        findings=[*_findings(runs, measured[PLAIN], is_tiny=is_tiny), *same_ids],
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
            " too': tokens are also drafted where that pays. Neither is done in 'plain' and 'exact'.",
            "'exact': rows are the same bit for bit whatever shares their forwards.",
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
        Finding("served exact / served plain", ratio(runs[EXACT].ms_per_token, runs[PLAIN].ms_per_token)),
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
