"""How soon a session begins whose prompt begins like another's: time to its first token against the other's."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from evaluation.bench_decode import equal_share
from evaluation.bench_machine import machine, sizes
from evaluation.bench_report import Bars, Cell, Finding, Report, Table
from evaluation.bench_runs import OnRun, Spread, ratio
from evaluation.bench_served import ServedStack, ServedTurn, request_for

TAIL_TOKENS = 16
NUM_WARMUPS = 1
MOST_SHARE = 0.10
FIRST = "first session with the prefix"
SECOND = "second, other end, while the first is open"
AGAIN = "third, the first one's prompt again"
CLOSED = "fourth, other end, all others closed"
STRANGER = "a session with another prefix"
KINDS = (FIRST, SECOND, AGAIN, CLOSED, STRANGER)

Prompts = Callable[[int, int], Sequence[int]]
"""The prompt of a number with so many tokens; prompts of different numbers share no beginning."""


async def measure_prefix(
    stack: ServedStack,
    prompts: Prompts,
    *,
    prefix_tokens: int,
    num_tokens: int,
    num_runs: int,
    threads: int,
    on_run: OnRun = lambda done, total: None,
) -> Report:
    """Measures rounds of sessions, each round with a prefix that no session had before.

    Args:
        prefix_tokens: that sessions have in common.
        num_tokens: new tokens of each session.
    """
    slot = next(iter(stack.experts))
    turns: dict[str, list[ServedTurn]] = {kind: [] for kind in KINDS}
    total = NUM_WARMUPS + num_runs
    for number in range(total):
        prefix = list(prompts(10 * number, prefix_tokens))

        async def ask(kind: str, prompt_ids: Sequence[int]) -> None:
            turns[kind].append(await stack.turn(request_for(prompt_ids, num_tokens, fixed_expert=slot)))

        await ask(FIRST, [*prefix, *prompts(10 * number + 1, TAIL_TOKENS)])
        await ask(SECOND, [*prefix, *prompts(10 * number + 2, TAIL_TOKENS)])
        await ask(AGAIN, [*prefix, *prompts(10 * number + 1, TAIL_TOKENS)])
        await stack.tidy()
        await ask(CLOSED, [*prefix, *prompts(10 * number + 3, TAIL_TOKENS)])
        await ask(STRANGER, prompts(10 * number + 4, prefix_tokens + TAIL_TOKENS))
        await stack.tidy()
        on_run(number + 1, total)
    measured = {kind: of_kind[NUM_WARMUPS:] for kind, of_kind in turns.items()}
    first_ms = {kind: [1000 * turn.arrived[0] for turn in of_kind] for kind, of_kind in measured.items()}
    rows: list[list[Cell]] = []
    for kind, values in first_ms.items():
        value = Spread.of(values)
        rows.append([kind, value.median, value.low, value.high, ratio(values, first_ms[FIRST]).median])
    columns = ("session", "ms to first token", "least", "most", "of the first session's")
    return Report(
        suite="prefix",
        question="How soon does a session begin whose prompt begins like another's?",
        configuration={
            **machine(threads), **sizes(stack.checkpoint), "experts": len(stack.experts),
            "prefix_tokens": prefix_tokens, "tail_tokens": TAIL_TOKENS, "new_tokens": num_tokens, "runs": num_runs,
            "warmups": NUM_WARMUPS, "fixed_expert": slot, "greedy": True,
        },
        findings=[
            *(Finding(f"time to first token, {kind} / first", ratio(first_ms[kind], first_ms[FIRST]),
                      at_most=MOST_SHARE) for kind in (SECOND, AGAIN, CLOSED)),
            Finding("time to first token, another prefix / first", ratio(first_ms[STRANGER], first_ms[FIRST])),
            Finding("ids of the same prompt again equal to the first ones",
                    equal_share([turn.ids for turn in measured[AGAIN]], [turn.ids for turn in measured[FIRST]]),
                    at_least=1.0),
        ],
        tables=[Table("Time to the first token", columns, rows)],
        panels=[Bars("Time to the first token", "ms", {kind: Spread.of(each) for kind, each in first_ms.items()})],
        notes=["One expert writes all tokens, so that it has read the prefix in the first session; the router"
               " reads every prompt too."],
    )  # fmt: skip
