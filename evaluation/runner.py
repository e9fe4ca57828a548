"""Asks every system every item through the running services, many at a time."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Protocol

from evaluation.systems.served import System
from fusionroute.client import RouterClient
from fusionroute.lab.tasks import Item
from fusionroute.v1.router_pb2 import FinishReason


@dataclass(frozen=True, slots=True)
class Answer:
    """What a system wrote.

    Attributes:
        text: the whole answer.
        is_complete: whether it ended with the end of sequence, not by running out of tokens.
    """

    text: str
    is_complete: bool


@dataclass(frozen=True, slots=True)
class Outcome:
    """A system's answer to an item."""

    item: Item
    system: System
    answer: Answer

    @property
    def is_right(self) -> bool:
        """Exact match, the end included."""
        return self.answer.is_complete and self.answer.text == self.item.answer


class Answerer(Protocol):
    """Whoever can answer a prompt as a system would."""

    async def answer(self, prompt: str, system: System) -> Answer:
        """The answer, greedy."""


@dataclass(frozen=True, slots=True)
class ServedAnswerer:
    """Answers through a router service."""

    router: RouterClient
    max_tokens: int
    timeout_seconds: float = 60.0

    async def answer(self, prompt: str, system: System) -> Answer:
        """The answer that the services stream. Raises FusionRouteError as they do."""
        pieces: list[str] = []
        reason = FinishReason.FINISH_REASON_UNSPECIFIED
        request = system.request(prompt, self.max_tokens)
        async with aclosing(self.router.generate(request, self.timeout_seconds)) as events:
            async for event in events:
                kind = event.WhichOneof("event")
                if kind == "token":
                    pieces.append(event.token.text)
                elif kind == "finished":
                    pieces.append(event.finished.text)
                    reason = event.finished.reason
        return Answer("".join(pieces), reason == FinishReason.FINISH_REASON_EOS)


async def run_rounds(
    answerer: Answerer,
    rounds: Sequence[Sequence[Item]],
    systems: Sequence[System],
    *,
    num_concurrent: int = 16,
    budget_seconds: float = float("inf"),
    on_outcome: Callable[[Outcome], None] = lambda outcome: None,
) -> list[Outcome]:
    """Outcomes of all systems on the items of as many whole rounds as were begun within the budget.

    A round once begun is finished, so every system has answered exactly the same items, the first round
    always among them. Outcomes come in the order of rounds, items and systems, whatever finished first.

    Args:
        answerer: answers single prompts, many at a time.
        rounds: items in the order in which they may be asked.
        systems: who is asked.
        num_concurrent: requests in flight.
        budget_seconds: no round begins later than so many seconds from now.
        on_outcome: told each outcome as it comes.

    Raises:
        ExceptionGroup: of what the answerer raised; the other requests are cancelled.
    """
    deadline = time.monotonic() + budget_seconds
    outcomes: dict[tuple[int, int, int], Outcome] = {}

    def jobs() -> Iterator[tuple[int, int, int]]:
        for number, items in enumerate(rounds):
            if number > 0 and time.monotonic() >= deadline:
                return
            for place in range(len(items)):
                for which in range(len(systems)):
                    yield number, place, which

    waiting = jobs()

    async def work() -> None:
        for key in waiting:
            number, place, which = key
            item, system = rounds[number][place], systems[which]
            outcomes[key] = Outcome(item, system, await answerer.answer(item.prompt, system))
            on_outcome(outcomes[key])

    async with asyncio.TaskGroup() as group:
        for _ in range(num_concurrent):
            group.create_task(work())
    return [outcomes[key] for key in sorted(outcomes)]
