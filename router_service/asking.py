"""Asking a model for the next row, wherever its cache stands: catch-up, replay and retry are one loop.

A `Text` knows the tokens; a `Model` has cached some of them. `ask` sends what the model lacks. When the model says
that it lacks more (it was evicted, restarted, or is another instance now), the missing tokens are sent again within
the same call, so the decode loop never learns of it.
"""

from __future__ import annotations

import asyncio
import math
import random
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol

import numpy as np
import structlog
from numpy.typing import NDArray

from fusionroute import tracing
from fusionroute.engine import Engine, StepCall
from fusionroute.errors import FusionRouteError, InternalFault, Reason, Unavailable
from fusionroute.number_formats import as_float32
from fusionroute.short_rows import ShortRow
from router_service import metrics
from router_service.hedging import hedged_step
from router_service.session_text import NEXT_ROW, Text, Wanted

log = structlog.get_logger(__name__)

FIRST_PAUSE_SECONDS = 0.02
LONGEST_PAUSE_SECONDS = 1.0
SECONDS_PER_TOKEN_SENT = 0.02
"""What an attempt is granted for each token that it sends, above what one token is granted."""

_REPLAY = frozenset({Reason.SESSION_UNKNOWN, Reason.DIGEST_MISMATCH, Reason.EPOCH_MISMATCH})
ABSENT = frozenset({Reason.DRAINING, Reason.EXPERT_UNAVAILABLE, Reason.DEADLINE_PASSED})
_FULL = frozenset({Reason.SESSION_BUSY, Reason.KV_MEMORY_FULL, Reason.QUEUE_FULL})
_PASSING = ABSENT | _FULL


@dataclass(frozen=True, slots=True)
class Answer:
    """A model's rows.

    Attributes:
        rows: logits [n, V], float32: those asked for, then one for each drafted id.
        head_scores: of a router's heads [n, k], float32.
        epoch: of the slot whose instance answered; of the router itself, of its model.
        cache: which cache answered.
        forward_seconds: within the model's forwards.
        drafted_ids: by which the model has gone on.
        top: in place of rows, what is known of each where only its highest logits were asked for.
        whole: asks for the rows that `top` stands for.
    """

    rows: NDArray[np.float32]
    head_scores: NDArray[np.float32] | None
    epoch: int
    cache: str
    forward_seconds: float
    drafted_ids: tuple[int, ...] = ()
    top: tuple[ShortRow, ...] = ()
    whole: Callable[[], Awaitable[Answer]] | None = None


@dataclass(frozen=True, slots=True)
class Patience:
    """How long to ask for one row.

    Attributes:
        row_seconds: in all, waiting for a restarted expert included.
        attempt_seconds: for the answer to one token sent; the same call is then made again.
        absent_seconds: while the model is not there at all, or does not answer. What is merely full is waited for.
        hedge_after_seconds: a replica is asked as well when no answer has come by then; None = never.
    """

    row_seconds: float
    attempt_seconds: float = math.inf
    absent_seconds: float = math.inf
    hedge_after_seconds: float | None = None

    def while_absent(self, absent_seconds: float, attempt_seconds: float) -> Patience:
        """The same, with less patience for a model that is not there or does not answer."""
        return replace(
            self, absent_seconds=absent_seconds, attempt_seconds=min(self.attempt_seconds, attempt_seconds)
        )


class Model(Protocol):
    """Something that can be asked for rows."""

    @property
    def slot(self) -> str:
        """The slot that it fills; empty for the router itself."""

    async def locate(self, text: Text, deadline: float) -> Cache:
        """The cache to ask now for a session; waits for one until `deadline` (time.monotonic())."""

    def another(self, text: Text, cache: Cache) -> Cache | None:
        """A second cache that could be asked at the same time as `cache`, if there is one."""

    def can_be_asked(self, text: Text) -> bool:
        """Whether `locate` would return at once."""

    def absent_seconds(self, text: Text) -> float:
        """For how long nobody could be asked for a session; 0 while somebody can."""

    def report(self, cache: Cache, error: FusionRouteError, began: float) -> None:
        """Hears that a cache could not be asked by an attempt that began at `began` (time.monotonic())."""

    def seconds_until_retry(self) -> float:
        """Takes a retry out of the model's budget; how long to wait for it."""


class Cache(Protocol):
    """One running instance of a model."""

    @property
    def name(self) -> str:
        """Differs between instances and between their restarts."""

    async def step(self, call: StepCall, deadline: float, top_logits: int = 0) -> Answer:
        """One step; with `top_logits` so many of the highest logits may come instead of rows.

        Raises:
            FusionRouteError: it cannot be done, or not now.
        """


async def ask(model: Model, text: Text, patience: Patience, wanted: Wanted = NEXT_ROW) -> Answer:
    """Rows of a model for a text: by default the one that scores its next token.

    Raises:
        FusionRouteError: what cannot be mended by sending more tokens or by waiting, or what was still wrong when
            `patience` had come to its end.
    """
    return await _Asking(model, text, patience, wanted).answer()


def check_answer(answer: Answer, wanted: Wanted) -> None:
    """Raises InternalFault unless an answer has as many rows as were asked for, and drafted ids that exist."""
    most = 0 if wanted.drafting is None else wanted.drafting.num_tokens
    num_rows, width = answer.rows.shape
    num_rows += len(answer.top)
    drafted = answer.drafted_ids
    if len(drafted) > most or num_rows != len(wanted.rows) + len(drafted) or max(drafted, default=0) >= width:
        raise InternalFault(
            Reason.INTERNAL,
            f"{answer.cache} answered {num_rows} rows and {len(drafted)} drafted tokens; {len(wanted.rows)} rows and at"
            f" most {most} drafted tokens below {width} were asked for",
        )


class _Asking:
    """Rows being asked for: what has been tried, and until when."""

    __slots__ = (
        "absent_until",
        "attempt_seconds",
        "began",
        "deadline",
        "had_fault",
        "model",
        "patience",
        "pause",
        "text",
        "wanted",
    )

    def __init__(self, model: Model, text: Text, patience: Patience, wanted: Wanted) -> None:
        self.model, self.text, self.patience, self.wanted = model, text, patience, wanted
        now = self.began = time.monotonic()
        self.deadline = now + patience.row_seconds
        self.absent_until = min(self.deadline, now + patience.absent_seconds)
        self.attempt_seconds = patience.attempt_seconds
        self.pause = FIRST_PAUSE_SECONDS
        self.had_fault = False

    async def answer(self) -> Answer:
        while True:
            cache = await self.model.locate(self.text, self.absent_until)
            call = self.text.call(cache.name, self.deadline, self.wanted)
            attempt_deadline = self._attempt_deadline(call)
            try:
                if self.patience.hedge_after_seconds is None:
                    answer = await cache.step(call, attempt_deadline, self.wanted.top_logits)
                else:
                    answer = await self._hedged(cache, call, attempt_deadline)
                check_answer(answer, self.wanted)
            except FusionRouteError as error:
                await self._mend(cache, call, error)
                continue
            slot, drafted = self.model.slot, answer.drafted_ids
            if self.text.answered(slot, answer.cache, answer.epoch, self.wanted, drafted):
                metrics.REPLAYS.labels(slot=self.model.slot).inc()
            return replace(answer, whole=partial(self._whole, cache, call)) if answer.top else answer

    async def _whole(self, cache: Cache, call: StepCall) -> Answer:
        """The same rows, whole: from what the instance has kept, or computed again."""
        try:
            return await cache.step(call, self._attempt_deadline(call))
        except FusionRouteError as error:
            self._trace(cache, call, error)
            return await ask(self.model, self.text, self.patience, replace(self.wanted, top_logits=0))

    def _attempt_deadline(self, call: StepCall) -> float:
        allowed = self.attempt_seconds + SECONDS_PER_TOKEN_SENT * (len(call.token_ids) - 1)
        self.began = time.monotonic()
        return min(self.deadline, self.began + allowed)

    async def _hedged(self, cache: Cache, call: StepCall, deadline: float) -> Answer:
        again = partial(self.text.call, deadline=self.deadline, wanted=self.wanted)
        return await hedged_step(self.model, self.text, cache, call, again, deadline, self.patience)

    async def _mend(self, cache: Cache, call: StepCall, error: FusionRouteError) -> None:
        """Returns when the row can be asked for again; raises what cannot be mended."""
        reason = error.reason
        self._trace(cache, call, error)
        if reason in _REPLAY and call.from_position > 0:
            self.text.lost(cache.name)
            metrics.REPLAYS.labels(slot=self.model.slot).inc()
            self.model.report(cache, error, self.began)
            return
        if reason is Reason.POSITION_AHEAD:
            self.text.has_cached(cache.name, error.cached_length or 0)
            return
        is_fault = isinstance(error, InternalFault)
        if not (reason in _PASSING or reason in _REPLAY or (is_fault and not self.had_fault)):
            raise error
        # One fault may be of that instance alone; the second one is what the model has to say.
        self.had_fault = self.had_fault or is_fault
        self.model.report(cache, error, self.began)
        if reason is Reason.DEADLINE_PASSED:
            self.attempt_seconds *= 2  # one that is slow, not silent, must not be broken off for ever
        await self._pause(cache, error)

    def _trace(self, cache: Cache, call: StepCall, error: FusionRouteError) -> None:
        """What failed is worth a span."""
        if tracing.is_on():
            facts: tracing.Attributes = {
                "slot": self.model.slot,
                "cache": cache.name,
                "num_tokens": len(call.token_ids),
            }
            tracing.note("attempt", time.monotonic() - self.began, facts, error=error.reason.value)

    async def _pause(self, cache: Cache, error: FusionRouteError) -> None:
        """Waits for the next attempt; raises the error when there is no time for one."""
        wait = max(self.pause, min(error.retry_after_seconds or 0.0, LONGEST_PAUSE_SECONDS))
        if error.reason not in _FULL:
            wait = max(wait, self.model.seconds_until_retry())
        wait *= random.uniform(0.5, 1.0)  # noqa: S311 - jitter, not a secret
        until = self.absent_until if error.reason in ABSENT else self.deadline
        if time.monotonic() + wait >= until:
            raise error
        self.text.num_retries += 1
        metrics.RETRIES.labels(slot=self.model.slot, reason=error.reason.value).inc()
        log.info("asking_again", slot=self.model.slot, cache=cache.name, reason=error.reason.value)
        await asyncio.sleep(wait)
        self.pause = min(2 * self.pause, LONGEST_PAUSE_SECONDS)


@dataclass(frozen=True, slots=True)
class LocalModel:
    """A model in this process: the router itself. It is its own and only cache."""

    engine: Engine
    name: str = "router"
    slot: str = ""

    async def locate(self, text: Text, deadline: float) -> LocalModel:
        """Itself."""
        return self

    def another(self, text: Text, cache: Cache) -> None:
        """There is no other."""

    def can_be_asked(self, text: Text) -> bool:
        """The engine is always there."""
        return True

    def absent_seconds(self, text: Text) -> float:
        """Never."""
        return 0.0

    def report(self, cache: Cache, error: FusionRouteError, began: float) -> None:
        """Nothing to learn."""

    def seconds_until_retry(self) -> float:
        """At once: nobody else is stormed."""
        return 0.0

    async def step(self, call: StepCall, deadline: float, top_logits: int = 0) -> Answer:
        """One step of the engine, with whole rows: they are here."""
        try:
            future = self.engine.submit(call)
            if not future.done():
                async with asyncio.timeout_at(
                    asyncio.get_running_loop().time() + deadline - time.monotonic()
                ):
                    await future
            outcome = future.result()
        except TimeoutError:
            raise Unavailable(Reason.DEADLINE_PASSED, "the router's forward did not end in time") from None
        scores = outcome.head_scores
        return Answer(
            rows=as_float32(outcome.rows),
            head_scores=None if scores is None else scores.numpy(),
            epoch=self.engine.facts.epoch,
            cache=self.name,
            forward_seconds=outcome.forward_seconds,
            drafted_ids=outcome.drafted_ids,
        )
