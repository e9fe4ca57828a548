"""Asks several ways in rounds, as many as there is time for, so that all have answered the same questions."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence

from evaluation.questions import Outcome, Question
from evaluation.systems.ways import Way

AskIn = Callable[[Question, Way], Awaitable[Outcome]]
"""Whoever can answer a question in one of the ways."""


async def run_rounds(
    ask: AskIn,
    rounds: Sequence[Sequence[Question]],
    ways: Sequence[Way],
    *,
    num_concurrent: int = 16,
    budget_seconds: float = float("inf"),
    on_outcome: Callable[[Outcome], None] = lambda outcome: None,
) -> list[Outcome]:
    """Outcomes of all ways on the questions of as many whole rounds as were begun within the budget.

    A round once begun is finished, so every way has answered exactly the same questions, the first round always among
    them. Outcomes come in the order of rounds, questions and ways, whatever finished first.

    Args:
        ask: called many times at once.
        rounds: questions in the order in which they may be asked.
        ways: who is asked.
        num_concurrent: requests in flight.
        budget_seconds: no round begins later than so many seconds from now.
        on_outcome: told each outcome as it comes.

    Raises:
        ExceptionGroup: of what `ask` raised; the other requests are cancelled.
    """
    deadline = time.monotonic() + budget_seconds
    outcomes: dict[tuple[int, int, int], Outcome] = {}

    def jobs() -> Iterator[tuple[int, int, int]]:
        for number, questions in enumerate(rounds):
            if number > 0 and time.monotonic() >= deadline:
                return
            for place in range(len(questions)):
                for which in range(len(ways)):
                    yield number, place, which

    waiting = jobs()

    async def work() -> None:
        for key in waiting:
            number, place, which = key
            outcomes[key] = await ask(rounds[number][place], ways[which])
            on_outcome(outcomes[key])

    async with asyncio.TaskGroup() as group:
        for _ in range(num_concurrent):
            group.create_task(work())
    return [outcomes[key] for key in sorted(outcomes)]
