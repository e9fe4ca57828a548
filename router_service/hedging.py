"""Asking a replica as well when the first one is slow: the first answer wins. Costs a task for each step."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from fusionroute.background import end_task
from fusionroute.engine import StepCall
from fusionroute.errors import FusionRouteError
from router_service import metrics

if TYPE_CHECKING:
    from router_service.asking import Answer, Cache, Model, Patience
    from router_service.session_text import Text


async def hedged_step(
    model: Model,
    text: Text,
    cache: Cache,
    call: StepCall,
    again: Callable[[str], StepCall],
    deadline: float,
    patience: Patience,
) -> Answer:
    """One step of `cache`, or of a replica that is asked `patience.hedge_after_seconds` later and is faster.

    Args:
        call: the step of `cache`.
        again: the same for another cache, by its name.

    Raises:
        FusionRouteError: what the first one answered, when no other one could help.
    """
    began = time.monotonic()
    first = asyncio.create_task(cache.step(call, deadline))
    second: asyncio.Task[Answer] | None = None
    try:
        await asyncio.wait([first], timeout=patience.hedge_after_seconds)
        other = None if first.done() else model.another(text, cache)
        if other is None:
            return await first
        second = asyncio.create_task(other.step(again(other.name), deadline))
        await asyncio.wait([first, second], return_when=asyncio.FIRST_COMPLETED)
        if not first.done() and second.exception() is None:
            metrics.HEDGES.labels(slot=model.slot, outcome="second").inc()
            return second.result()
        if first.done() and first.exception() is None:
            metrics.HEDGES.labels(slot=model.slot, outcome="first").inc()
            return first.result()
        return await _either(model, (cache, other), (first, second), began)
    finally:
        for task in (first, second):
            if task is not None:
                await end_task(task)


async def _either(
    model: Model,
    caches: tuple[Cache, Cache],
    tasks: tuple[asyncio.Task[Answer], asyncio.Task[Answer]],
    began: float,
) -> Answer:
    """The answer of the one that has not failed; raises what the first one has to say when both have."""
    await asyncio.wait(tasks)
    first, second = tasks
    error, is_first = second.exception(), second.exception() is not None
    failed, error = (caches[1], error) if is_first else (caches[0], first.exception())
    if isinstance(error, FusionRouteError):
        model.report(failed, error, began)
    metrics.HEDGES.labels(slot=model.slot, outcome="first" if is_first else "second").inc()
    return first.result() if is_first else second.result()
