"""A checkpoint as it is served, and the change from one to the next while turns are being written.

    current  --replace-->  retiring  --its last turn has ended-->  closed

A turn belongs to the checkpoint under which it was begun, to its end; new turns belong to the current one.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import structlog

from fusionroute.background import end_task
from fusionroute.engine import Engine
from fusionroute.router_model import Manifest
from router_service.constraints import Constraints
from router_service.ensemble import Ensemble
from router_service.text import AnswerText
from router_service.turn_request import Offer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CONTEXT_TOKENS = 16
"""Tokens before an answer that may decide how its first token is spelt, such as a leading space."""

log = structlog.get_logger(__name__)


@dataclass(slots=True, eq=False)
class Serving:
    """All that belongs to one checkpoint, and how many use it.

    Attributes:
        checkpoint_id: empty for the one of the settings.
        stop: closes the engine.
    """

    checkpoint_id: str
    manifest: Manifest
    engine: Engine
    ensemble: Ensemble
    offer: Offer
    tokenizer: PreTrainedTokenizerBase
    stop: AsyncExitStack
    num_users: int = 0
    _constraints: Constraints | None = None
    _unused: asyncio.Event = field(default_factory=asyncio.Event)

    def enter(self) -> None:
        """Somebody begins to use it: it is not closed before `leave`."""
        self.num_users += 1
        self._unused.clear()

    def leave(self) -> None:
        """The opposite of `enter`."""
        self.num_users -= 1
        if not self.num_users:
            self._unused.set()

    @contextlib.contextmanager
    def in_use(self) -> Iterator[Serving]:
        """Used within the context."""
        self.enter()
        try:
            yield self
        finally:
            self.leave()

    async def until_unused(self) -> None:
        """Returns when nobody uses it."""
        while self.num_users:
            await self._unused.wait()

    @property
    def slots(self) -> tuple[str, ...]:
        """Those that a turn may ask: of the experts, and of the base model where there is one."""
        return tuple(model.slot for model in self.ensemble.models)

    @property
    def constraints(self) -> Constraints:
        """What answers can be told to look like, for this vocabulary."""
        if self._constraints is None:
            width = self.offer.logits_width
            self._constraints = Constraints(self.tokenizer, width, self.ensemble.end_ids)
        return self._constraints

    def answer_text(self, stops: Sequence[str], before: Sequence[int]) -> AnswerText:
        """Turns an answer's ids into text.

        Args:
            stops: of its turn.
            before: the session's tokens before the answer; the last few suffice.
        """
        return AnswerText(self._decode, tuple(stops), before[-CONTEXT_TOKENS:])

    def _decode(self, token_ids: Sequence[int]) -> str:
        text: str = self.tokenizer.decode(
            token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return text


@dataclass(frozen=True, slots=True)
class PromotionReport:
    """What the router has made of the latest promotion.

    Attributes:
        revision: the latest one it has acted upon; 0 = none.
        error: why that one was not taken up; empty when it was.
    """

    revision: int = 0
    error: str = ""


@dataclass(slots=True, eq=False)
class ServedCheckpoints:
    """The current checkpoint and those whose turns are not finished yet.

    Attributes:
        current: of new turns.
        retiring: earlier ones, oldest first.
        promotion: for those who ask how a promotion went.
    """

    current: Serving
    retiring: list[Serving] = field(default_factory=list)
    promotion: PromotionReport = field(default_factory=PromotionReport)
    _tasks: set[asyncio.Task[None]] = field(default_factory=set)

    @contextlib.asynccontextmanager
    async def open(self) -> AsyncIterator[ServedCheckpoints]:
        """Closes all of them after the context."""
        try:
            yield self
        finally:
            for task in list(self._tasks):
                await end_task(task)
            for serving in self.all():
                await serving.stop.aclose()

    def all(self) -> list[Serving]:
        """Every checkpoint in memory, the current one last."""
        return [*self.retiring, self.current]

    def of(self, fingerprint: str) -> Serving | None:
        """The newest one with this fingerprint."""
        return next((each for each in reversed(self.all()) if each.offer.checkpoint == fingerprint), None)

    def replace(self, new: Serving) -> None:
        """From now on new turns belong to `new`; the old one is closed after its last turn."""
        old, self.current = self.current, new
        self.retiring.append(old)
        task = asyncio.create_task(self._retire(old), name=f"retire {old.offer.checkpoint}")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _retire(self, old: Serving) -> None:
        await old.until_unused()
        self.retiring.remove(old)
        await old.stop.aclose()
        log.info("checkpoint_retired", checkpoint_id=old.checkpoint_id, fingerprint=old.offer.checkpoint)
