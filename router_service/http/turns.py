"""Several turns for one HTTP request: begun together, read together, ended together."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass

from fusionroute.background import end_task
from fusionroute.errors import FusionRouteError
from fusionroute.v1 import router_pb2
from router_service.http.service import RouterApi
from router_service.live_turn import LiveTurn


@dataclass(frozen=True, slots=True)
class Event:
    """One event of one of the turns."""

    index: int
    """Of the turn among those of the request."""
    event: router_pb2.GenerationEvent


@asynccontextmanager
async def begun(
    api: RouterApi, requests: Sequence[router_pb2.GenerateRequest]
) -> AsyncIterator[list[LiveTurn]]:
    """Begins a turn for each request; those that are one-off are cancelled when the block breaks off.

    Raises:
        FusionRouteError: one cannot be served; what was begun is cancelled.
    """
    lives: list[LiveTurn] = []
    try:
        for request in requests:
            lives.append(await api.begin(request))
        yield lives
    except BaseException:
        for live, request in zip(lives, requests, strict=False):
            if request.one_off:
                live.cancel()
        raise


async def events_of_all(
    api: RouterApi, lives: Sequence[LiveTurn], silence_seconds: float, from_token: int = 0
) -> AsyncGenerator[list[Event], None]:
    """What happens in several turns, until all have ended: whatever is ready at a time, together.

    Args:
        api: tells of turns.
        lives: the turns.
        silence_seconds: after so long without an event there is an empty list.
        from_token: the first token wanted.

    Raises:
        FusionRouteError: why one of them broke off.
    """
    ready: deque[Event | FusionRouteError] = deque()
    news = asyncio.Event()
    num_running = len(lives)

    async def read(index: int, live: LiveTurn) -> None:
        nonlocal num_running
        try:
            async with aclosing(api.events(live, from_token)) as events:
                async for event in events:
                    ready.append(Event(index, event))
                    news.set()
        except FusionRouteError as error:
            ready.append(error)
        finally:
            num_running -= 1
            news.set()

    tasks = [asyncio.create_task(read(index, live), name="http turn") for index, live in enumerate(lives)]
    try:
        while ready or num_running:
            if not ready:
                news.clear()
                if not await _happened(news, silence_seconds):
                    yield []
                    continue
            batch: list[Event] = []
            while ready and isinstance(each := ready[0], Event):
                batch.append(each)
                ready.popleft()
            if batch:
                yield batch
            elif ready and isinstance(each := ready[0], FusionRouteError):
                raise each
    finally:
        for task in tasks:
            task.cancel()
        for task in tasks:
            await end_task(task)
        # what a task raised that is no FusionRouteError is our own fault and must be seen
    for task in tasks:
        if not task.cancelled() and (error := task.exception()) is not None:
            raise error


async def _happened(news: asyncio.Event, seconds: float) -> bool:
    try:
        async with asyncio.timeout(seconds):
            await news.wait()
    except TimeoutError:
        return False
    return True
