"""When a router tries a promotion, and when it tries again."""

from __future__ import annotations

import asyncio
import time
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

from fusionroute.manifest import COMPLETE_FILE, ExpertRecord
from fusionroute.promotions import PromotedCheckpoint, Promotion, PromotionStore
from fusionroute.router_loading import LoadedRouter
from fusionroute.vocabulary import tokenizer_fingerprint
from router_service.promotion_watch import CheckpointSource, PromotionWatch
from router_service.serving import ServedCheckpoints, Serving
from router_service.settings import RouterSettings
from router_service.turn_request import Offer
from tests.served_stack import save_router
from tests.tiny_models import WIDTH, word_tokenizer

RECORDS = (ExpertRecord("math", "math", tokenizer_fingerprint(word_tokenizer()), WIDTH, "weights"),)


def serving(checkpoint_id: str, loaded: LoadedRouter) -> Serving:
    """A checkpoint without an engine."""
    parts: Any = None
    offer = Offer(("math",), (), parts, WIDTH, 96, loaded.fingerprint)
    return Serving(checkpoint_id, loaded.checkpoint.manifest, parts, parts, offer, parts, AsyncExitStack())


class Watched:
    """A watch over checkpoints in a folder; notes what was served."""

    def __init__(self, folder: Path, retry_seconds: float) -> None:
        options: dict[str, Any] = {
            "checkpoint": str(save_router(folder / "own", RECORDS)),
            "checkpoints_dir": folder,
        }
        source = CheckpointSource(RouterSettings(**options))
        self.tried: list[str] = []
        self.served = ServedCheckpoints(serving("", source.load(PromotedCheckpoint())))
        no_store: PromotionStore = None  # type: ignore[assignment]  # act_upon is told what is promoted
        self.watch = PromotionWatch(
            no_store, self.served, source, self.serve, lambda slot: True, retry_seconds
        )

    async def serve(self, loaded: LoadedRouter, checkpoint_id: str) -> Serving:
        self.tried.append(checkpoint_id)
        if checkpoint_id == "huge":
            raise MemoryError("not enough")
        return serving(checkpoint_id, loaded)

    async def told(self, checkpoint_id: str, revision: int) -> str:
        """Why it was not taken up."""
        await self.watch.act_upon(Promotion(revision, PromotedCheckpoint(checkpoint_id), ()))
        assert self.served.promotion.revision == revision
        return self.served.promotion.error


async def test_a_checkpoint_that_came_late_is_taken_up_after_a_wait(tmp_path: Path) -> None:
    watched = Watched(tmp_path, retry_seconds=0.2)
    (save_router(tmp_path / "a", RECORDS) / COMPLETE_FILE).rename(tmp_path / "later")
    assert COMPLETE_FILE in await watched.told("a", 1)
    (tmp_path / "later").rename(tmp_path / "a" / COMPLETE_FILE)
    assert COMPLETE_FILE in await watched.told("a", 1), "it is not tried at every look"
    await asyncio.sleep(0.25)
    assert await watched.told("a", 1) == ""
    assert watched.served.current.checkpoint_id == "a"
    assert await watched.told("a", 2) == ""
    assert watched.tried == ["a"], "what is served already is not loaded again"


async def test_each_wait_for_the_same_checkpoint_is_longer(tmp_path: Path) -> None:
    watched = Watched(tmp_path, retry_seconds=0.1)
    save_router(tmp_path / "huge", RECORDS)
    started = time.monotonic()
    while len(watched.tried) < 4:
        assert "MemoryError" in await watched.told("huge", 1)
        await asyncio.sleep(0.02)
    assert time.monotonic() - started >= 0.1 + 0.2 + 0.4
    assert watched.served.current.checkpoint_id == ""


async def test_another_promotion_does_not_wait_for_the_retry_of_the_last_one(tmp_path: Path) -> None:
    watched = Watched(tmp_path, retry_seconds=1000.0)
    save_router(tmp_path / "b", RECORDS)
    assert "does not exist" in await watched.told("a", 1)
    assert await watched.told("b", 2) == ""


async def test_a_redis_that_has_lost_everything_changes_nothing(tmp_path: Path) -> None:
    watched = Watched(tmp_path, retry_seconds=1000.0)
    save_router(tmp_path / "b", RECORDS)
    await watched.told("b", 5)
    await watched.watch.act_upon(Promotion(0, PromotedCheckpoint(), ()))
    assert (watched.served.current.checkpoint_id, watched.served.promotion.revision) == ("b", 5)


async def test_a_checkpoint_without_turns_is_retired_at_once(tmp_path: Path) -> None:
    watched = Watched(tmp_path, retry_seconds=1000.0)
    save_router(tmp_path / "b", RECORDS)
    await watched.told("b", 1)
    async with asyncio.timeout(5):
        while watched.served.retiring:
            await asyncio.sleep(0)
