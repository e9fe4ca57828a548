"""What more experts cost: ms per token of stacks with two, four and eight of them, in turns."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any

from evaluation.bench_machine import machine, sizes
from evaluation.bench_report import Bars, Cell, Finding, Report, Table, speed_table
from evaluation.bench_runs import NUM_WARMUPS, OnRun, Runs, Spread, Way, ratio, take_turns
from evaluation.bench_served import ServedStack, ServedTurn, request_for

MOST_GROWTH = 1.03

Prompts = Callable[[int], Sequence[int]]


async def measure_experts(
    stacks: Mapping[int, ServedStack],
    prompts: Prompts,
    *,
    num_tokens: int,
    num_runs: int,
    threads: int,
    on_run: OnRun = lambda done, total: None,
) -> Report:
    """Measures stacks of several sizes, all in turns.

    Args:
        stacks: by their number of experts.
        num_tokens: new tokens of each run.
    """
    turns: dict[int, list[ServedTurn]] = {count: [] for count in stacks}

    def way(count: int) -> Way:
        async def run(number: int) -> int:
            turns[count].append(await stacks[count].turn(request_for(prompts(number), num_tokens)))
            return len(turns[count][-1].ids)

        return run

    async def tidy() -> None:
        for stack in stacks.values():
            await stack.tidy()

    pids = [pid for stack in stacks.values() for pid in stack.all_pids]
    names = {count: f"{count} experts" for count in stacks}
    runs = await take_turns(
        {names[count]: way(count) for count in stacks}, num_runs=num_runs, pids=pids, tidy=tidy, on_run=on_run
    )
    folder = next(iter(stacks[min(stacks)].experts.values()))
    configuration = {
        **machine(threads), **sizes(folder), "experts": " ".join(map(str, stacks)),
        "prompt_tokens": len(prompts(0)), "new_tokens": num_tokens, "runs": num_runs, "warmups": NUM_WARMUPS,
        "combine": "sum", "greedy": True, "drafting": "off",
    }  # fmt: skip
    measured = {count: of_stack[NUM_WARMUPS:] for count, of_stack in turns.items()}
    return _report(configuration, {count: runs[name] for count, name in names.items()}, measured)


def _report(
    configuration: Mapping[str, Any], runs: Mapping[int, Runs], measured: Mapping[int, Sequence[ServedTurn]]
) -> Report:
    familiar, same, changed = (
        {
            count: [_ms(turn.familiar_gaps(changed=which)) for turn in of_stack]
            for count, of_stack in measured.items()
        }
        for which in (None, False, True)
    )
    few, many = min(runs), max(runs)
    named = {each.name: each for each in runs.values()}
    return Report(
        suite="experts",
        question="Does a token get slower with more experts?",
        configuration=configuration,
        findings=[
            Finding(f"ms / token with {many} experts / with {few}, once an expert has written",
                    ratio(familiar[many], familiar[few]), at_most=MOST_GROWTH),
            *(Finding(name, ratio(kind[many], kind[few])) for name, kind in (
                ("of it tokens by the same expert as the token before", same),
                ("of it tokens by another expert, which has to catch up", changed),
            ) if all(kind[many] + kind[few])),
            Finding(f"ms / token with {many} experts / with {few}, whole turns",
                    ratio(runs[many].ms_per_token, runs[few].ms_per_token)),
            Finding(f"CPU ms / token with {many} experts / with {few}, whole turns",
                    ratio(runs[many].cpu_ms_per_token, runs[few].cpu_ms_per_token)),
        ],
        tables=[speed_table("Whole turns", named), _table(measured, familiar, same, changed)],
        panels=[
            Bars("Once an expert has written in the session", "ms per token",
                 {runs[count].name: Spread.of(values) for count, values in familiar.items()}),
            Bars("Whole turns, first visits included", "ms per token",
                 {name: Spread.of(each.ms_per_token) for name, each in named.items()}),
        ],
        notes=["An expert that writes for the first time in a session has the whole session to read; that is once for"
               " each expert, not for each token, and counted in whole turns only.",
               "Routes of random heads change the more often the more experts there are, and an expert that comes back"
               " has the more tokens to catch up with: one forward of several rows. That is what routes cost, whatever"
               " the number of experts; tokens by the same expert as before show what experts that are idle cost."],
        runs={"experts": named},
    )  # fmt: skip


def _ms(gaps: Sequence[float]) -> float:
    """Mean, in milliseconds; of none 0, as for turns too short to change between experts."""
    return 1000 * sum(gaps) / len(gaps) if gaps else 0.0


def _table(
    measured: Mapping[int, Sequence[ServedTurn]],
    familiar: Mapping[int, Sequence[float]],
    same: Mapping[int, Sequence[float]],
    changed: Mapping[int, Sequence[float]],
) -> Table:
    rows: list[list[Cell]] = []
    for count, turns in measured.items():
        speed = Spread.of(familiar[count])
        visited = Spread.of(len(set(turn.experts)) for turn in turns)
        changes = Spread.of(sum(a != b for a, b in pairwise(turn.experts)) for turn in turns)
        parts = [Spread.of(each[count]).median for each in (same, changed)]
        rows.append(
            [f"{count} experts", speed.median, speed.low, speed.high, *parts, visited.median, changes.median]
        )
    columns = (
        "stack", "ms / token", "least", "most", "same expert", "another one", "experts that wrote",
        "changes of expert",
    )  # fmt: skip
    return Table("Tokens of experts that had written before", columns, rows)
