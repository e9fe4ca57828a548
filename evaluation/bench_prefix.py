"""How soon a session begins whose prompt begins like another's: time to its first token against the other's."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from evaluation.bench_decode import equal_share
from evaluation.bench_machine import machine, sizes
from evaluation.bench_report import Bars, Cell, Finding, Report, Table
from evaluation.bench_runs import CpuClock, OnRun, Spread, ratio
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
    rounds = _Rounds(stack, prompts, prefix_tokens, num_tokens, slot)
    for number in range(NUM_WARMUPS + num_runs):
        await rounds.run(number)
        on_run(number + 1, NUM_WARMUPS + num_runs)
    configuration = {
        **machine(threads), **sizes(stack.checkpoint), "experts": len(stack.experts),
        "prefix_tokens": prefix_tokens, "tail_tokens": TAIL_TOKENS, "new_tokens": num_tokens, "runs": num_runs,
        "warmups": NUM_WARMUPS, "fixed_expert": slot, "greedy": True,
    }  # fmt: skip
    measured = {kind: of_kind[NUM_WARMUPS:] for kind, of_kind in rounds.sessions.items()}
    return _report(configuration, measured)


@dataclass(frozen=True, slots=True)
class _Session:
    """A session of one turn.

    Attributes:
        cpu_seconds: of all processes, until its stream ended.
    """

    turn: ServedTurn
    cpu_seconds: float


class _Rounds:
    """Rounds of sessions, one of each kind."""

    def __init__(
        self, stack: ServedStack, prompts: Prompts, prefix_tokens: int, num_tokens: int, slot: str
    ) -> None:
        self._stack, self._prompts, self._prefix_tokens = stack, prompts, prefix_tokens
        self._num_tokens, self._slot = num_tokens, slot
        self._cpu = CpuClock(stack.all_pids)
        self.sessions: dict[str, list[_Session]] = {kind: [] for kind in KINDS}

    async def run(self, number: int) -> None:
        """A round with a prefix of its own."""
        prompts, first = self._prompts, 10 * number
        prefix = list(prompts(first, self._prefix_tokens))
        await self._ask(FIRST, [*prefix, *prompts(first + 1, TAIL_TOKENS)])
        await self._ask(SECOND, [*prefix, *prompts(first + 2, TAIL_TOKENS)])
        await self._ask(AGAIN, [*prefix, *prompts(first + 1, TAIL_TOKENS)])
        await self._stack.tidy()
        await self._ask(CLOSED, [*prefix, *prompts(first + 3, TAIL_TOKENS)])
        await self._ask(STRANGER, prompts(first + 4, self._prefix_tokens + TAIL_TOKENS))
        await self._stack.tidy()

    async def _ask(self, kind: str, prompt_ids: Sequence[int]) -> None:
        before = self._cpu.seconds()
        turn = await self._stack.turn(request_for(prompt_ids, self._num_tokens, fixed_expert=self._slot))
        self.sessions[kind].append(_Session(turn, self._cpu.seconds() - before))


def _report(configuration: Mapping[str, Any], measured: Mapping[str, Sequence[_Session]]) -> Report:
    first_ms = {kind: [1000 * each.turn.arrived[0] for each in of_kind] for kind, of_kind in measured.items()}
    cpu_ms = {kind: [1000 * each.cpu_seconds for each in of_kind] for kind, of_kind in measured.items()}
    ids = {kind: [each.turn.ids for each in of_kind] for kind, of_kind in measured.items()}
    rows: list[list[Cell]] = []
    for kind, values in first_ms.items():
        value, share = Spread.of(values), ratio(values, first_ms[FIRST])
        rows.append([kind, value.median, value.low, value.high, share.median, Spread.of(cpu_ms[kind]).median])
    columns = (
        "session", "ms to first token", "least", "most", "of the first session's", "CPU ms, whole session"
    )  # fmt: skip
    return Report(
        suite="prefix",
        question="How soon does a session begin whose prompt begins like another's?",
        configuration=configuration,
        findings=[
            *(Finding(f"time to first token, {kind} / first", ratio(first_ms[kind], first_ms[FIRST]),
                      at_most=MOST_SHARE) for kind in (SECOND, AGAIN, CLOSED)),
            Finding("time to first token, another prefix / first", ratio(first_ms[STRANGER], first_ms[FIRST])),
            Finding(f"CPU of the whole session, {SECOND} / first", ratio(cpu_ms[SECOND], cpu_ms[FIRST])),
            Finding("ids of the same prompt again equal to the first ones", equal_share(ids[AGAIN], ids[FIRST]),
                    at_least=1.0),
        ],
        tables=[Table("Time to the first token", columns, rows)],
        panels=[Bars("Time to the first token", "ms", {kind: Spread.of(each) for kind, each in first_ms.items()})],
        notes=["Through the served stack: from the request to the token's arrival at the client over gRPC.",
               "One expert writes all tokens, so that it has read the prefix in the first session; the router"
               " reads every prompt too."],
    )  # fmt: skip
