"""An answer while it is written."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import suppress
from types import TracebackType
from typing import Self

from fusionroute.answers import AnswerToken, Completion
from fusionroute.errors import FusionRouteError
from fusionroute.v1.router_pb2 import Finished, GenerationEvent, Started

LEAVE_SECONDS = 3.0
UNFINISHED = "the answer is not complete: read its stream to the end first"


class AnswerStream:
    """An answer while it is written: iterate over its tokens, within `async with` if you may leave early.

    Attributes:
        started: session, seed, rule and checkpoint, from the first token on.
    """

    def __init__(
        self,
        events: AsyncGenerator[GenerationEvent, None],
        cancel: Callable[[str], Awaitable[object]],
        *,
        session_id: str,
        cancels_on_leaving: bool,
    ) -> None:
        self.session_id = session_id
        self.started: Started | None = None
        self._events = events
        self._cancel = cancel
        self._cancels_on_leaving = cancels_on_leaving
        self._tokens: list[AnswerToken] = []
        self._finished: Finished | None = None
        self._has_begun = self._is_closed = False
        self._iterator = self._read()

    @property
    def text(self) -> str:
        """What has come so far."""
        held = self._finished.text if self._finished is not None else ""
        return "".join(token.text for token in self._tokens) + held

    @property
    def completion(self) -> Completion:
        """The whole answer, once the stream has ended. Raises RuntimeError before."""
        if self._finished is None or self.started is None:
            raise RuntimeError(UNFINISHED)
        return Completion.of(self.started, self._tokens, self._finished)

    async def read(self) -> Completion:
        """The whole answer. Raises FusionRouteError as the router meant it."""
        async with self:
            async for _ in self:
                pass
        return self.completion

    async def cancel(self) -> None:
        """Stops the writing; what was written has come or comes yet, and the answer ends as cancelled."""
        await self._cancel(self.session_id)

    async def aclose(self) -> None:
        """Reads no more. A question that stands for itself is cancelled then."""
        if self._is_closed:
            return
        self._is_closed = True
        await self._iterator.aclose()
        await self._events.aclose()
        if self._cancels_on_leaving and self._has_begun and self._finished is None:
            with suppress(FusionRouteError, TimeoutError):  # it may have ended meanwhile
                async with asyncio.timeout(LEAVE_SECONDS):
                    await self._cancel(self.session_id)

    async def _read(self) -> AsyncGenerator[AnswerToken, None]:
        self._has_begun = True
        async for event in self._events:
            match event.WhichOneof("event"):
                case "started":
                    self.started = event.started
                case "token":
                    self._tokens.append(AnswerToken.of(event.token))
                    yield self._tokens[-1]
                case "finished":
                    self._finished = event.finished

    def __aiter__(self) -> AsyncGenerator[AnswerToken, None]:
        return self._iterator

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.aclose()
