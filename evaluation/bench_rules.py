"""What the combine rules cost: expert calls per token and tokens per second, on the same prompts in turns."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from evaluation.bench_machine import machine, sizes
from evaluation.bench_report import Bars, Finding, Report, Table, speed_table
from evaluation.bench_runs import NUM_WARMUPS, OnRun, Runs, Spread, Way, ratio, take_turns
from evaluation.bench_served import ServedStack, ServedTurn, request_for
from fusionroute.v1.router_pb2 import CombineRule

RULES = {
    "sum": CombineRule.COMBINE_RULE_SUM,
    "gated_sum": CombineRule.COMBINE_RULE_GATED_SUM,
    "mixture": CombineRule.COMBINE_RULE_MIXTURE,
    "select": CombineRule.COMBINE_RULE_SELECT,
    "router": CombineRule.COMBINE_RULE_ROUTER,
}
"""The last one asks no expert: what is left when none is needed."""

Prompts = Callable[[int], Sequence[int]]


async def measure_rules(
    stack: ServedStack,
    prompts: Prompts,
    *,
    num_tokens: int,
    num_runs: int,
    threads: int,
    prompts_per_run: int,
    ignore_eos: bool,
    on_run: OnRun = lambda done, total: None,
) -> Report:
    """Measures the rules that the checkpoint can serve.

    Args:
        num_tokens: new tokens of each turn at most.
        prompts_per_run: turns of each run, one after the other.
        ignore_eos: whether turns go on after the end of their answer.
    """
    available = set((await stack.router.info()).available_combine)
    rules = {name: rule for name, rule in RULES.items() if rule in available}
    turns: dict[str, list[list[ServedTurn]]] = {name: [] for name in rules}

    def way(name: str) -> Way:
        async def run(number: int) -> int:
            of_run: list[ServedTurn] = []
            for place in range(prompts_per_run):
                request = request_for(
                    prompts(number * prompts_per_run + place),
                    num_tokens,
                    combine=rules[name],
                    ignore_eos=ignore_eos,
                )
                of_run.append(await stack.turn(request))
            turns[name].append(of_run)
            return sum(len(turn.ids) for turn in of_run)

        return run

    runs = await take_turns(
        {name: way(name) for name in rules},
        num_runs=num_runs, pids=stack.all_pids, tidy=stack.tidy, on_run=on_run,
    )  # fmt: skip
    configuration = {
        **machine(threads), **sizes(stack.checkpoint), "experts": len(stack.experts), "new_tokens": num_tokens,
        "prompts_per_run": prompts_per_run, "runs": num_runs, "warmups": NUM_WARMUPS, "greedy": True,
        "drafting": "off", "ends_at_eos": not ignore_eos,
    }  # fmt: skip
    calls = {name: _calls_per_token(of_rule[NUM_WARMUPS:]) for name, of_rule in turns.items()}
    return _report(configuration, runs, calls)


def _report(
    configuration: Mapping[str, Any], runs: Mapping[str, Runs], calls: Mapping[str, Sequence[float]]
) -> Report:
    """Every rule against `sum`."""
    gains = {name: ratio(runs["sum"].ms_per_token, each.ms_per_token) for name, each in runs.items()}
    cpu = {name: ratio(runs["sum"].cpu_ms_per_token, each.cpu_ms_per_token) for name, each in runs.items()}
    compared = [name for name in runs if name != "sum"]
    return Report(
        suite="rules",
        question="What do the combine rules cost?",
        configuration=configuration,
        findings=[
            *(Finding(f"tokens / s of {name} / of sum", gains[name]) for name in compared),
            *(Finding(f"tokens / CPU s of {name} / of sum", cpu[name]) for name in compared),
            *(Finding(f"expert calls per token, {name}", Spread.of(calls[name])) for name in runs),
        ],
        tables=[
            speed_table("One session at a time", runs),
            Table("Who takes part", ("rule", "expert calls / token", "least", "most", "tokens / s against sum"),
                  [[name, Spread.of(calls[name]).median, min(calls[name]), max(calls[name]),
                    gains[name].median] for name in runs]),
        ],
        panels=[
            Bars("Speed", "ms per token", {name: Spread.of(each.ms_per_token) for name, each in runs.items()}),
            Bars("Expert calls", "per token", {name: Spread.of(each) for name, each in calls.items()}),
        ],
        notes=["'router' asks no expert at all; it is what select comes down to where the router's own row wins.",
               "The same prompts under every rule; their answers differ, so that only rates can be compared."],
        runs={"rules": runs},
    )  # fmt: skip


def _calls_per_token(of_runs: Sequence[Sequence[ServedTurn]]) -> list[float]:
    return [
        sum(turn.statistics.num_expert_calls for turn in turns) / sum(len(turn.ids) for turn in turns)
        for turns in of_runs
    ]
