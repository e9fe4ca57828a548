"""Several turns for one HTTP request: begun as there is room, read together, cancelled together."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass

from fusionroute.background import end_task
from fusionroute.errors import OutOfRoom
from fusionroute.v1 import router_pb2
from router_service.http.service import RouterApi
from router_service.live_turn import LiveTurn


@dataclass(frozen=True, slots=True)
class Event:
    """One event of one of the turns.

    Attributes:
        index: of the turn among those of the request.
        live: the turn.
    """

    index: int
    live: LiveTurn
    event: router_pb2.GenerationEvent


@dataclass(frozen=True, slots=True)
class Resumed:
    """Where a stream that broke is to go on."""

    session_id: str
    from_token: int


class Turns:
    """The turns of one request.

    Args:
        api: begins them and tells of them.
        requests: one for each.
        resumed: follow this turn instead; there is one request then, which is not begun.
    """

    def __init__(
        self, api: RouterApi, requests: Sequence[router_pb2.GenerateRequest], resumed: Resumed | None = None
    ) -> None:
        self._api, self._requests, self._resumed = api, requests, resumed
        self._ready: deque[Event | Exception] = deque()
        self._news, self._one_ended = asyncio.Event(), asyncio.Event()
        self._lives: list[LiveTurn] = []
        self._readers: set[asyncio.Task[None]] = set()
        self._are_begun = False

    async def events(self, silence_seconds: float) -> AsyncGenerator[list[Event], None]:
        """What happens until all have ended: whatever is ready at a time, together.

        Nothing is told before all have begun, or all for which there was room: a request that cannot be served fails
        before it has an answer. Turns that are one-off are cancelled when the reading ends before they do.

        Args:
            silence_seconds: after so long without an event there is an empty list.

        Raises:
            FusionRouteError: one of them cannot begin, or has broken off.
        """
        beginner = asyncio.create_task(self._begin_all(), name="http beginner")
        try:
            while not beginner.done() or self._readers or self._ready:
                if not self._ready or not self._are_begun:
                    self._news.clear()
                    if not await _happened(self._news, silence_seconds):
                        yield []
                    continue
                if batch := self._take():
                    yield batch
        except BaseException:
            self._cancel()
            raise
        finally:
            await end_task(beginner)
            for reader in list(self._readers):
                await end_task(reader)

    def _take(self) -> list[Event]:
        """The events up to the next error. Raises what comes first."""
        batch: list[Event] = []
        while self._ready:
            each = self._ready[0]
            if not isinstance(each, Event):
                if batch:
                    break
                raise each
            batch.append(each)
            self._ready.popleft()
        return batch

    async def _begin_all(self) -> None:
        try:
            if self._resumed is not None:
                where = self._resumed
                self._read(await self._api.resume(where.session_id, where.from_token), where.from_token)
            else:
                for request in self._requests:
                    self._read(await self._begin(request), 0)
        except Exception as error:
            self._ready.append(error)
        self._tell_begun()

    async def _begin(self, request: router_pb2.GenerateRequest) -> LiveTurn:
        """Begins a turn; where there is no room for it, once another one of the same request has ended."""
        while True:
            self._one_ended.clear()
            try:
                return await self._api.begin(request)
            except OutOfRoom:
                if not self._readers:
                    raise
            self._tell_begun()
            await self._one_ended.wait()

    def _read(self, live: LiveTurn, from_token: int) -> None:
        index = len(self._lives)
        self._lives.append(live)
        reader = asyncio.create_task(self._follow(index, live, from_token), name="http turn")
        self._readers.add(reader)
        reader.add_done_callback(self._ended)

    async def _follow(self, index: int, live: LiveTurn, from_token: int) -> None:
        try:
            async with aclosing(self._api.events(live, from_token)) as events:
                async for event in events:
                    self._ready.append(Event(index, live, event))
                    self._news.set()
        except Exception as error:
            self._ready.append(error)

    def _ended(self, reader: asyncio.Task[None]) -> None:
        self._readers.discard(reader)
        self._one_ended.set()
        self._news.set()

    def _tell_begun(self) -> None:
        self._are_begun = True
        self._news.set()

    def _cancel(self) -> None:
        for live, request in zip(self._lives, self._requests, strict=False):
            if request.one_off and not live.is_over:
                live.cancel()


async def _happened(news: asyncio.Event, seconds: float) -> bool:
    try:
        async with asyncio.timeout(seconds):
            await news.wait()
    except TimeoutError:
        return False
    return True
