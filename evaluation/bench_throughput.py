"""How many sessions at a time cost how much: tokens per second of all of them, routed and with one expert for all."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from evaluation.bench_machine import machine, sizes
from evaluation.bench_report import Finding, Lines, Report, Table
from evaluation.bench_runs import OnRun, Runs, Spread, Way, ratio, take_turns
from evaluation.bench_served import ServedStack, request_for

SESSIONS = (1, 4, 16, 64)
NUM_WARMUPS = 1
PROMPT_TOKENS = 16
LEAST_GAIN = {"bfloat16": 8.0, "float16": 8.0, "float32": 4.5}
"""Of 16 sessions over one, by number format, where forwards take nearly all of the time."""
LARGE_HIDDEN = 512
ONE_EXPERT = "one expert"
KINDS = ("routed", ONE_EXPERT)

Prompts = Callable[[int], Sequence[int]]


async def measure_throughput(
    stacks: Mapping[str, ServedStack],
    prompts: Prompts,
    *,
    num_tokens: int,
    num_runs: int,
    threads: int,
    sessions: Sequence[int] = SESSIONS,
    on_run: OnRun = lambda done, total: None,
) -> Report:
    """Measures stacks of several number formats, all in turns.

    Args:
        stacks: by number format; the same shape otherwise.
        num_tokens: new tokens of each session.
        sessions: how many at a time.
    """
    ways = {
        _name(dtype, kind, count): _way(
            stack, prompts, num_tokens, count, max(sessions), next(iter(stack.experts)) if kind == ONE_EXPERT else ""
        )
        for dtype, stack in stacks.items() for kind in KINDS for count in sessions
    }  # fmt: skip

    async def tidy() -> None:
        for stack in stacks.values():
            await stack.tidy()

    pids = [pid for stack in stacks.values() for pid in stack.all_pids]
    runs = await take_turns(
        ways, num_runs=num_runs, pids=pids, num_warmups=NUM_WARMUPS, tidy=tidy, on_run=on_run
    )
    first = next(iter(stacks.values()))
    facts = sizes(next(iter(first.experts.values())))
    configuration = {
        **machine(threads), **facts, "dtype": " and ".join(stacks),
        "experts": len(first.experts), "prompt_tokens": PROMPT_TOKENS, "new_tokens": num_tokens,
        "runs": num_runs, "warmups": NUM_WARMUPS, "combine": "sum", "greedy": True, "drafting": "off",
    }  # fmt: skip
    return _report(configuration, runs, list(stacks), sessions, has_aims=facts["hidden"] >= LARGE_HIDDEN)


def _way(
    stack: ServedStack, prompts: Prompts, num_tokens: int, count: int, most: int, fixed_expert: str
) -> Way:
    """So many sessions at a time, with other prompts in each round.

    Args:
        most: sessions at a time of any way.
    """

    async def run(number: int) -> int:
        requests = [
            request_for(prompts(number * most + place)[:PROMPT_TOKENS], num_tokens, fixed_expert=fixed_expert)
            for place in range(count)
        ]
        return sum(len(turn.ids) for turn in await stack.turns(requests))

    return run


def _report(
    configuration: Mapping[str, Any],
    runs: Mapping[str, Runs],
    dtypes: Sequence[str],
    sessions: Sequence[int],
    *,
    has_aims: bool,
) -> Report:
    kinds = [(dtype, kind) for dtype in dtypes for kind in KINDS]

    def lines(title: str, label: str, measured: Callable[[Runs], Sequence[float]]) -> Lines:
        points = {
            f"{dtype}, {kind}": [
                (count, Spread.of(measured(runs[_name(dtype, kind, count)])).median) for count in sessions
            ]
            for dtype, kind in kinds
        }
        return Lines(title, "sessions at a time", label, points, has_log_x=True)

    return Report(
        suite="throughput",
        question="How many tokens per second do many sessions get together?",
        configuration=configuration,
        findings=[
            each
            for dtype, kind in kinds
            for each in _findings(runs, dtype, kind, sessions, has_aims=has_aims)
        ],
        tables=[_table(runs, kinds, sessions)],
        panels=[
            lines("All sessions together", "tokens per second", lambda each: each.tokens_per_second),
            lines("Processor time of all processes", "CPU ms per token", lambda each: each.cpu_ms_per_token),
        ],
        notes=["Whole turns, short prompts included; the client runs on the same cores and is counted too."],
        runs={"throughput": runs},
    )


def _name(dtype: str, kind: str, count: int) -> str:
    return f"{dtype}, {kind}, {count} sessions"


def _findings(
    runs: Mapping[str, Runs], dtype: str, kind: str, sessions: Sequence[int], *, has_aims: bool
) -> list[Finding]:
    """Sixteen against one, and the most against sixteen."""

    def gain(many: int, few: int) -> Spread:
        above, below = runs[_name(dtype, kind, many)], runs[_name(dtype, kind, few)]
        return ratio(above.tokens_per_second, below.tokens_per_second)

    def cheaper(many: int, few: int) -> Spread:
        above, below = runs[_name(dtype, kind, few)], runs[_name(dtype, kind, many)]
        return ratio(above.cpu_ms_per_token, below.cpu_ms_per_token)

    found = []
    if 16 in sessions and 1 in sessions:
        what = f"tokens / s of 16 sessions / of one, {dtype}, {kind}"
        found.append(Finding(what, gain(16, 1), at_least=LEAST_GAIN[dtype] if has_aims else None))
        found.append(Finding(f"tokens / CPU s of 16 sessions / of one, {dtype}, {kind}", cheaper(16, 1)))
    if 64 in sessions and 16 in sessions:
        what = f"tokens / s of 64 sessions / of 16, {dtype}, {kind}"
        found.append(Finding(what, gain(64, 16), at_least=1.0))
    return found


def _table(runs: Mapping[str, Runs], kinds: Sequence[tuple[str, str]], sessions: Sequence[int]) -> Table:
    rows: list[list[str | int | float | None]] = []
    for dtype, kind in kinds:
        for count in sessions:
            each = runs[_name(dtype, kind, count)]
            speed, cpu = Spread.of(each.tokens_per_second), Spread.of(each.cpu_ms_per_token)
            rows.append([f"{dtype}, {kind}", count, speed.median, speed.low, speed.high, cpu.median])
    columns = ("stack", "sessions", "tokens / s", "least", "most", "CPU ms / token")
    return Table("All sessions together", columns, rows)
