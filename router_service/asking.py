"""Asking a model for the next row, wherever its cache stands: catch-up, replay and retry are one loop.

A `Text` knows the tokens; a `Model` has cached some of them. `ask` sends what the model lacks. When the model says
that it lacks more (it was evicted, restarted, or is another instance now), the missing tokens are sent again within
the same call, so the decode loop never learns of it.
"""

from __future__ import annotations

import asyncio
import random
import time
from array import array
from dataclasses import dataclass, field
from typing import Protocol

import structlog

from fusionroute.engine import Engine, StepCall, digest
from fusionroute.engine.digest import EMPTY
from fusionroute.errors import FusionRouteError, Reason, Unavailable
from fusionroute.fusion import Row

log = structlog.get_logger(__name__)

FIRST_PAUSE_SECONDS = 0.02
LONGEST_PAUSE_SECONDS = 1.0

_REPLAY = frozenset({Reason.SESSION_UNKNOWN, Reason.DIGEST_MISMATCH, Reason.EPOCH_MISMATCH})
_PASSING = frozenset(
    {
        Reason.SESSION_BUSY,
        Reason.KV_MEMORY_FULL,
        Reason.QUEUE_FULL,
        Reason.DRAINING,
        Reason.EXPERT_UNAVAILABLE,
        Reason.DEADLINE_PASSED,
    }
)


@dataclass(frozen=True, slots=True)
class Answer:
    """A model's row for the last token of a text.

    Attributes:
        row: logits [V], float32.
        head_scores: of a router's heads [k], float32.
        epoch: of the model that answered.
        cache: which cache answered.
        forward_seconds: within the model's forwards.
    """

    row: Row
    head_scores: Row | None
    epoch: int
    cache: str
    forward_seconds: float


class Model(Protocol):
    """Something that can be asked for rows."""

    async def locate(self, deadline: float) -> Cache:
        """The cache to ask now; waits for one until `deadline` (time.monotonic())."""

    def report(self, cache: Cache, error: FusionRouteError) -> None:
        """Hears that a cache could not be asked."""


class Cache(Protocol):
    """One running instance of a model."""

    @property
    def name(self) -> str:
        """Differs between instances and between their restarts."""

    async def step(self, call: StepCall, deadline: float) -> Answer:
        """One step; raises FusionRouteError."""


@dataclass(slots=True)
class Text:
    """A session's tokens and how far each model has cached them.

    Attributes:
        session_id: under which the models cache it.
        fence: the writer's fencing token.
        tokens: all tokens, prompts included.
    """

    session_id: str
    fence: int
    tokens: list[int]
    num_replays: int = 0
    _digests: array[int] = field(default_factory=lambda: array("Q", [EMPTY]))
    _cached: dict[str, int] = field(default_factory=dict)

    def call(self, cache_name: str, deadline: float) -> StepCall:
        """The step that brings a cache up to date and asks for the last row."""
        start = min(self._cached.get(cache_name, 0), len(self.tokens) - 1)
        return StepCall(
            session_id=self.session_id,
            from_position=start,
            token_ids=self.tokens[start:],
            num_rows=1,
            fence=self.fence,
            prefix_digest=self._digest(start),
            deadline=deadline,
        )

    def has_cached(self, cache_name: str, length: int) -> None:
        """Remembers how many tokens a cache holds."""
        self._cached[cache_name] = length

    def _digest(self, position: int) -> int:
        """Digest of the tokens before `position`."""
        for index in range(len(self._digests) - 1, position):
            self._digests.append(digest(self.tokens[index : index + 1], self._digests[-1]))
        return self._digests[position]


async def ask(model: Model, text: Text, timeout_seconds: float) -> Answer:
    """The row for the last token of `text`.

    Raises:
        FusionRouteError: what cannot be mended by sending more tokens or by waiting, or what was still wrong after
            `timeout_seconds`.
    """
    deadline = time.monotonic() + timeout_seconds
    pause = FIRST_PAUSE_SECONDS
    while True:
        cache = await model.locate(deadline)
        call = text.call(cache.name, deadline)
        try:
            answer = await cache.step(call, deadline)
        except FusionRouteError as error:
            if error.reason in _REPLAY and call.from_position > 0:
                text.num_replays += 1
                text.has_cached(cache.name, 0)
                model.report(cache, error)
                continue
            if error.reason is Reason.POSITION_AHEAD:
                text.has_cached(cache.name, error.cached_length or 0)
                continue
            if error.reason not in _PASSING and error.reason not in _REPLAY:
                raise
            model.report(cache, error)
            wait = max(pause, min(error.retry_after_seconds or 0.0, LONGEST_PAUSE_SECONDS))
            wait *= random.uniform(0.5, 1.0)  # noqa: S311 - jitter, not a secret
            if time.monotonic() + wait >= deadline:
                raise
            log.info("asking_again", session=text.session_id, cache=cache.name, reason=error.reason.value)
            await asyncio.sleep(wait)
            pause = min(2 * pause, LONGEST_PAUSE_SECONDS)
            continue
        text.has_cached(cache.name, len(text.tokens))
        return answer


@dataclass(frozen=True, slots=True)
class LocalModel:
    """A model in this process: the router itself. It is its own and only cache."""

    engine: Engine
    name: str = "router"

    async def locate(self, deadline: float) -> LocalModel:
        """Itself."""
        return self

    def report(self, cache: Cache, error: FusionRouteError) -> None:
        """Nothing to learn: the engine is always there."""

    async def step(self, call: StepCall, deadline: float) -> Answer:
        """One step of the engine."""
        try:
            async with asyncio.timeout_at(asyncio.get_running_loop().time() + deadline - time.monotonic()):
                outcome = await self.engine.step(call)
        except TimeoutError:
            raise Unavailable(Reason.DEADLINE_PASSED, "the router's forward did not end in time") from None
        scores = outcome.head_scores
        return Answer(
            row=outcome.rows[0].float().numpy(),
            head_scores=None if scores is None else scores[0].numpy(),
            epoch=self.engine.facts.epoch,
            cache=self.name,
            forward_seconds=outcome.forward_seconds,
        )
