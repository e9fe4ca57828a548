"""A turn that is written or followed here: its events, kept so that streams can follow it from any token."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass, field

from fusionroute.errors import FusionRouteError
from router_service.costs import Costs
from router_service.generation import Ending, WrittenToken
from router_service.turn_request import Turn, Wishes


def _nothing() -> None:
    """There is no writer to interrupt."""


@dataclass(slots=True, eq=False)
class LiveTurn:
    """What streams see of a turn while it is written and for as long as they look.

    Attributes:
        request_id: of the turn: that of the request that began it, or drawn.
        answer_position: tokens of the session before the answer.
        context: the last few of these.
        is_written_here: whether this router writes it, or tries to; False while it only follows.
        costs: None while and where nothing is written here.
        interrupt: ends the writer's waiting for a model.
    """

    session_id: str
    request_id: str
    turn: Turn
    wishes: Wishes
    answer_position: int
    context: list[int] = field(default_factory=list)
    is_written_here: bool = False
    tokens: list[WrittenToken] = field(default_factory=list)
    ending: Ending | None = None
    error: FusionRouteError | None = None
    cancelled: bool = False
    costs: Costs | None = None
    interrupt: Callable[[], None] = _nothing
    num_followers: int = 0
    left_alone_since: float = field(default_factory=time.monotonic)
    _news: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def is_over(self) -> bool:
        """Whether no further token will come."""
        return self.ending is not None or self.error is not None

    def publish(self, token: WrittenToken) -> None:
        """A token was written."""
        self.tokens.append(token)
        self._announce()

    def end(self, ending: Ending) -> None:
        """The turn is complete."""
        self.ending = ending
        self._close()

    def fail(self, error: FusionRouteError) -> None:
        """The turn broke off; what was written stays and can be resumed."""
        self.error = error.afresh()
        self._close()

    def cancel(self) -> None:
        """Asks the writer to stop, also while it waits for a model."""
        self.cancelled = True
        self.interrupt()

    async def follow(self, from_token: int = 0) -> AsyncGenerator[WrittenToken, None]:
        """The answer's tokens from number `from_token` on as they come; ends with the turn.

        Raises:
            FusionRouteError: why the turn broke off.
        """
        self.num_followers += 1
        try:
            index = from_token
            while True:
                news = self._news
                while index < len(self.tokens):
                    yield self.tokens[index]
                    index += 1
                if self.error is not None:
                    raise self.error.afresh()  # each follower adds its own traceback
                if self.is_over:
                    return
                if news is self._news:
                    await news.wait()
        finally:
            self.num_followers -= 1
            self.left_alone_since = time.monotonic()

    def alone_for_seconds(self) -> float:
        """How long nobody has followed the turn."""
        return 0.0 if self.num_followers else time.monotonic() - self.left_alone_since

    def nobody_writes(self) -> None:
        """The writer here has ended."""
        self.interrupt = _nothing  # it holds the writer and with it the whole model

    def _close(self) -> None:
        self.nobody_writes()
        self._announce()

    def _announce(self) -> None:
        self._news.set()
        self._news = asyncio.Event()
