"""The engine that serves now, and its replacement by one with weights loaded anew.

load beside -> the same vocabulary and context? -> finite logits? -> the new engine serves, the old one finishes
   \\______________ anything wrong: refused, and the old one goes on as if nothing had been ______________/
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Self, TypeAlias

import structlog

from expert_service import metrics
from fusionroute.background import end_task
from fusionroute.engine import Engine, LoadedModel, ModelFacts, StepCall
from fusionroute.errors import (
    FusionRouteError,
    InternalFault,
    ModelRejected,
    Reason,
    SessionStateError,
    Unavailable,
)

log = structlog.get_logger(__name__)

LoadAnew: TypeAlias = Callable[[], Awaitable[LoadedModel]]
"""Loads the model from where the service was told to find it; raises ModelRejected."""
OnReload: TypeAlias = Callable[[ModelFacts], None]
WARM_UP_TOKENS = 4
RETIRE_SECONDS = 60.0
"""How long calls that have begun on the old weights may go on."""


@dataclass(slots=True, eq=False)
class _Running:
    """An engine and the calls that use it."""

    engine: Engine
    stop: AsyncExitStack
    num_calls: int = 0
    idle: asyncio.Event | None = None


class Held:
    """An engine that somebody uses, which keeps it from being stopped although another one may take over."""

    __slots__ = ("_running",)

    def __init__(self, running: _Running) -> None:
        self._running = running
        running.num_calls += 1

    @property
    def engine(self) -> Engine:
        """It."""
        return self._running.engine

    def release(self) -> None:
        """It is not used any more; to be called once."""
        running = self._running
        running.num_calls -= 1
        if running.idle is not None and running.num_calls == 0:
            running.idle.set()

    def released(self, _: object) -> None:
        """As `release`, for whoever calls with what has ended."""
        self.release()


class ServedModel:
    """One engine at a time. Use as an asynchronous context manager, which runs it.

    Args:
        engine: the first one, not running yet.
        load_anew: None = it cannot be reloaded.
        retire_seconds: how long calls may go on with an engine that has been replaced.
    """

    def __init__(
        self, engine: Engine, load_anew: LoadAnew | None = None, *, retire_seconds: float = RETIRE_SECONDS
    ) -> None:
        self._current = _Running(engine, AsyncExitStack())
        self._load_anew = load_anew
        self._retire_seconds = retire_seconds
        self._reloading: asyncio.Task[ModelFacts] | None = None
        self._retiring: dict[asyncio.Task[None], Engine] = {}
        self.draining = False
        self.on_reload: OnReload = lambda facts: None

    async def __aenter__(self) -> Self:
        await self._current.stop.enter_async_context(self.engine)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.draining = True
        for task in [*([self._reloading] if self._reloading else []), *self._retiring]:
            await end_task(task)
        await self._current.stop.aclose()

    @property
    def engine(self) -> Engine:
        """The one that serves now."""
        return self._current.engine

    def engines(self) -> list[Engine]:
        """The one that serves, and those that finish."""
        return [self.engine, *self._retiring.values()]

    @contextmanager
    def use(self) -> Iterator[Engine]:
        """The engine for one call, which keeps it to the end of the block although another one may take over."""
        held = self.hold()
        try:
            yield held.engine
        finally:
            held.release()

    def hold(self) -> Held:
        """The engine for one call, until it is released."""
        return Held(self._current)

    async def drain(self, timeout_seconds: float) -> None:
        """Refuses new steps and waits for the others, at most so long; a reload that runs is given up."""
        self.draining = True
        if self._reloading is not None:
            await end_task(self._reloading)
        await self.engine.drain(timeout_seconds)

    async def reload(self) -> tuple[ModelFacts, int]:
        """Loads the weights anew and serves them. Goes on when the caller hangs up.

        Returns:
            The model that serves now, and the epoch of the one before.

        Raises:
            ModelRejected: it cannot be loaded, or cannot take the place of the one that serves.
            SessionStateError: RELOADING, another one runs.
            Unavailable: DRAINING.
        """
        if self.draining:
            raise Unavailable(Reason.DRAINING, "the service is about to stop")
        if self._load_anew is None:
            raise ModelRejected(
                Reason.MODEL_UNSUPPORTED, "this service does not know where its model comes from"
            )
        if self._reloading is not None and not self._reloading.done():
            raise SessionStateError(Reason.RELOADING, "a reload of this model is running; wait for its end")
        before = self.engine.facts
        task = self._reloading = asyncio.create_task(self._reload(self._load_anew), name="reload")
        # Nobody may be left to hear of a failure; it is in the log.
        task.add_done_callback(lambda done: None if done.cancelled() else done.exception())
        try:
            return await asyncio.shield(task), before.epoch
        except asyncio.CancelledError:
            if task.cancelled():
                raise Unavailable(Reason.DRAINING, "the service is about to stop") from None
            raise

    async def _reload(self, load_anew: LoadAnew) -> ModelFacts:
        log.info("reloading", model=self.engine.facts.name, epoch=self.engine.facts.epoch)
        try:
            facts = await self._replace(await load_anew())
        except FusionRouteError as error:
            metrics.RELOADS.labels(outcome=error.reason.value).inc()
            log.error("reload_refused", reason=error.reason.value, message=error.message)
            raise
        metrics.RELOADS.labels(outcome="done").inc()
        log.info("reloaded", model=facts.name, epoch=facts.epoch, weights=facts.weights_fingerprint)
        return facts

    async def _replace(self, model: LoadedModel) -> ModelFacts:
        old = self._current
        check_replacement(old.engine.facts, model.facts)
        stop = AsyncExitStack()
        engine = await stop.enter_async_context(Engine(model, old.engine.limits))
        try:
            await warm_up(engine)
        except BaseException:
            await stop.aclose()
            raise
        self._current = _Running(engine, stop)
        retiring = asyncio.create_task(self._retire(old), name="retire engine")
        self._retiring[retiring] = old.engine
        retiring.add_done_callback(self._retiring.pop)
        self.on_reload(model.facts)
        return model.facts

    async def _retire(self, old: _Running) -> None:
        """Lets the calls that have begun end, then frees what the old weights hold."""
        try:
            if old.num_calls:
                old.idle = asyncio.Event()
                try:
                    async with asyncio.timeout(self._retire_seconds):
                        await old.idle.wait()
                except TimeoutError:
                    log.warning("calls_cut_off", num_calls=old.num_calls, epoch=old.engine.facts.epoch)
        finally:
            await old.stop.aclose()
        log.info("retired", epoch=old.engine.facts.epoch)


def check_replacement(old: ModelFacts, new: ModelFacts) -> None:
    """Returns if `new` can take the place of `old` in sessions that go on.

    Raises:
        ModelRejected: naming the first fact that differs.
    """
    for field, reason in (
        ("tokenizer_fingerprint", Reason.VOCABULARY_MISMATCH),
        ("logits_width", Reason.VOCABULARY_MISMATCH),
        ("max_context_tokens", Reason.MODEL_UNSUPPORTED),
    ):
        was, would_be = getattr(old, field), getattr(new, field)
        if was != would_be:
            message = f"the model has {field} {would_be} now, the one that serves has {was}"
            raise ModelRejected(reason, message, metadata={"field": field, "limit": str(was)})
    if new.epoch <= old.epoch:
        raise InternalFault(
            Reason.INTERNAL, f"epoch {new.epoch} is not above {old.epoch}: the clock went back"
        )


async def warm_up(engine: Engine) -> None:
    """Runs a few tokens through an engine. Raises ModelRejected MODEL_BROKEN if that fails."""
    facts = engine.facts
    count = min(WARM_UP_TOKENS, facts.logits_width, facts.max_context_tokens)
    try:
        await engine.step(StepCall("warm-up", 0, list(range(count)), count))
        await engine.close_session("warm-up")
    except InternalFault as error:
        raise ModelRejected(Reason.MODEL_BROKEN, f"the model cannot be used: {error.message}") from error
