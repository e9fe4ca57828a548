"""Asks questions, many at a time, and keeps what comes in a journal."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from typing import Any

from evaluation.journal import Journal
from evaluation.questions import Question

Ask = Callable[[Question], Awaitable[dict[str, Any]]]
"""What is to be remembered of a question, as JSON has it."""

OnProgress = Callable[[int], None]
"""Told how many more questions are done."""


async def ask_all(
    questions: Iterable[Question],
    ask: Ask,
    journal: Journal,
    *,
    num_concurrent: int = 32,
    on_progress: OnProgress = lambda num_done: None,
) -> None:
    """Asks what the journal does not know yet. Questions with the same prompt and reference are asked once.

    Args:
        questions: in the order in which they may be asked.
        ask: raises what ends the run; the other requests are then cancelled, what had come is kept.
        num_concurrent: requests in flight.
        on_progress: also told what was known before.

    Raises:
        ExceptionGroup: of what `ask` raised.
    """
    alike: dict[tuple[Any, ...], list[Question]] = {}
    num_known = 0
    for question in questions:
        if question.id in journal.entries:
            num_known += 1
        else:
            alike.setdefault(_key(question), []).append(question)
    on_progress(num_known)
    waiting = iter(alike.values())

    async def work() -> None:
        for same in waiting:
            entry = await ask(same[0])
            for question in same:
                journal.add(question.id, entry)
            on_progress(len(same))

    async with asyncio.TaskGroup() as group:
        for _ in range(max(1, min(num_concurrent, len(alike)))):
            group.create_task(work())


def _key(question: Question) -> tuple[Any, ...]:
    prompt = question.prompt if isinstance(question.prompt, str) else tuple(map(str, question.prompt))
    return prompt, question.reference, question.task, question.max_tokens, question.stop, str(question.facts)
