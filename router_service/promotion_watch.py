"""Takes up the checkpoint that routers are told to serve, while turns are being written.

Polls the promotion in Redis. A checkpoint that cannot be served changes nothing here: the router goes on with the one
it has, says why, and tries again later or as soon as it is told something else.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import structlog

from fusionroute.background import end_task
from fusionroute.errors import FusionRouteError, ModelRejected, Reason, Unavailable
from fusionroute.promotions import PromotedCheckpoint, Promotion, PromotionStore
from fusionroute.router_loading import LoadedRouter, load_router
from fusionroute.router_model import Manifest, load_checkpoint
from router_service import metrics
from router_service.serving import PromotionReport, ServedCheckpoints, Serving
from router_service.settings import RouterSettings

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

FIRST_RETRY_SECONDS, LONGEST_RETRY_SECONDS = 30.0, 600.0
"""A checkpoint that could not be served may be whole by then, or its experts there; each wait doubles."""

log = structlog.get_logger(__name__)

Serve = Callable[[LoadedRouter, str], Awaitable[Serving]]
"""Makes a loaded checkpoint of this id ready to write turns."""


@dataclass(frozen=True, slots=True)
class CheckpointSource:
    """Where the router's checkpoints come from."""

    settings: RouterSettings

    def folder(self, promoted: PromotedCheckpoint) -> Path:
        """Where a promoted checkpoint lies; that of the settings where none is promoted."""
        if not promoted.checkpoint_id:
            return Path(self.settings.checkpoint)
        assert self.settings.checkpoints_dir is not None, "promotions are followed only with such a folder"
        return self.settings.checkpoints_dir / promoted.checkpoint_id

    def load(self, promoted: PromotedCheckpoint) -> LoadedRouter:
        """Loads a checkpoint; takes seconds to minutes.

        Raises:
            ModelRejected: it cannot be served, or the folder does not hold what was promoted.
        """
        settings = self.settings
        loaded = load_router(self.folder(promoted), dtype=settings.dtype, device=settings.device)
        is_comparable = bool(promoted.fingerprint) and settings.dtype == "auto"
        if is_comparable and loaded.fingerprint != promoted.fingerprint:
            raise ModelRejected(
                Reason.MODEL_BROKEN,
                f"{str(self.folder(promoted))!r} has fingerprint {loaded.fingerprint}, promoted was"
                f" {promoted.fingerprint}",
            )
        return loaded


@dataclass(slots=True, eq=False)
class PromotionWatch:
    """Follows the promotion. Use `running`.

    Attributes:
        promotions: what to serve.
        served: what is served.
        source: where checkpoints lie.
        serve: makes a loaded one ready.
        is_served: whether some expert serves a slot now.
        retry_seconds: the wait before a checkpoint that could not be served is tried again.
    """

    promotions: PromotionStore
    served: ServedCheckpoints
    source: CheckpointSource
    serve: Serve
    is_served: Callable[[str], bool]
    retry_seconds: float = FIRST_RETRY_SECONDS
    _retry_at: float = field(init=False)
    _next_pause: float = field(init=False)

    def __post_init__(self) -> None:
        self._next_pause = self.retry_seconds
        self._wait_before_retry()

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Follows within the context. A load that is under way when it ends is waited for by the interpreter."""
        task = asyncio.create_task(self._keep_up(), name="promotions")
        try:
            yield
        finally:
            await end_task(task)

    async def _keep_up(self) -> None:
        while True:
            try:
                await self.act_upon(await self.promotions.read())
            except Unavailable as error:
                log.warning("promotion_unknown", reason=error.reason.value, message=error.message)
            except Exception:
                log.exception("promotion_watch_failed")  # the next look may succeed
            await asyncio.sleep(self.source.settings.promotion_poll_seconds)

    async def act_upon(self, promotion: Promotion) -> None:
        """Serves what is promoted, unless it is served already or has just failed."""
        report, wanted = self.served.promotion, promotion.current
        if promotion.revision == 0:
            return  # never promoted, or Redis was lost: what is served goes on
        if promotion.revision == report.revision and (not report.error or time.monotonic() < self._retry_at):
            return
        if self._is_current(wanted):
            self.served.promotion = PromotionReport(promotion.revision)
            return
        if len(self.served.all()) >= self.source.settings.max_checkpoints:
            log.info(
                "promotion_waits", checkpoint_id=wanted.checkpoint_id, why="earlier turns are not finished"
            )
            return
        error = await self._take_up(wanted)
        if promotion.revision != report.revision:
            self._next_pause = self.retry_seconds
        self._wait_before_retry()
        self.served.promotion = PromotionReport(promotion.revision, error)

    def _wait_before_retry(self) -> None:
        self._retry_at = time.monotonic() + self._next_pause
        self._next_pause = min(2 * self._next_pause, LONGEST_RETRY_SECONDS)

    def _is_current(self, wanted: PromotedCheckpoint) -> bool:
        return self.served.current.checkpoint_id == wanted.checkpoint_id

    async def _take_up(self, wanted: PromotedCheckpoint) -> str:
        """Loads and serves a checkpoint; returns why it could not, or nothing."""
        started = time.monotonic()
        folder = self.source.folder(wanted)
        try:
            checkpoint = await asyncio.to_thread(load_checkpoint, folder)
            self._check(wanted, checkpoint.manifest)
            loaded = await asyncio.to_thread(self.source.load, wanted)
            new = await self.serve(loaded, wanted.checkpoint_id)
        except FusionRouteError as error:
            metrics.PROMOTIONS.labels(outcome="refused").inc()
            log.error("promotion_refused", checkpoint_id=wanted.checkpoint_id, message=error.message)
            return error.message
        except Exception as error:  # out of memory, a disk that fails: what is served goes on
            metrics.PROMOTIONS.labels(outcome="failed").inc()
            log.exception("promotion_failed", checkpoint_id=wanted.checkpoint_id)
            return f"loading {str(folder)!r} failed: {type(error).__name__}: {error}"
        self.served.replace(new)
        metrics.PROMOTIONS.labels(outcome="served").inc()
        log.info(
            "promotion_taken_up",
            checkpoint_id=wanted.checkpoint_id,
            fingerprint=new.offer.checkpoint,
            seconds=round(time.monotonic() - started, 3),
        )
        return ""

    def _check(self, wanted: PromotedCheckpoint, manifest: Manifest) -> None:
        """Stored sessions are of this vocabulary, and a new slot must have its expert.

        Raises:
            ModelRejected: VOCABULARY_MISMATCH, EXPERTS_MISMATCH.
        """
        name = wanted.checkpoint_id or "the checkpoint of the settings"
        current = self.served.current.manifest
        for fact in ("tokenizer_fingerprint", "logits_width"):
            got, have = getattr(manifest, fact), getattr(current, fact)
            if got != have:
                raise ModelRejected(
                    Reason.VOCABULARY_MISMATCH, f"{name} has {fact} {got}, the sessions here need {have}"
                )
        for slot in manifest.slots:
            if slot not in current.slots and not self.is_served(slot):
                raise ModelRejected(
                    Reason.EXPERTS_MISMATCH,
                    f"{name} routes to slot {slot!r}, which no expert serves; the current one knows"
                    f" {', '.join(current.slots)}",
                )
