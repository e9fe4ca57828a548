"""Steps that take less than waking a thread is worth are run by the caller's event loop: same rows, same rules."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence

import pytest
import torch

from fusionroute.engine import Engine, EngineLimits, StepCall, prepare_model
from fusionroute.engine.attention import RaggedBatch
from fusionroute.engine.expectation import FEWEST_FORWARDS
from fusionroute.engine.model import ForwardOutput, LoadedModel
from fusionroute.errors import FusionRouteError, Reason
from fusionroute.lone_caller import ALONE_STEPS
from tests.tiny_models import tiny_model, word_tokenizer

ALWAYS_SECONDS = 60.0
NUM_LEARNING = ALONE_STEPS + int(FEWEST_FORWARDS)


class WatchedModel(LoadedModel):
    """Knows which thread ran each forward, and how many sessions it was for."""

    def watch(self) -> None:
        self.forwards: list[tuple[str, int]] = []
        self.fails = False

    def forward(
        self,
        batch: RaggedBatch,
        token_ids: Sequence[int],
        positions: Sequence[int],
        wanted: Sequence[int],
        *,
        exact: bool = False,
    ) -> ForwardOutput:
        self.forwards.append((threading.current_thread().name, len(batch.segments)))
        if self.fails:
            raise RuntimeError("out of order")
        return super().forward(batch, token_ids, positions, wanted, exact=exact)


def watched_engine(quick_seconds: float = ALWAYS_SECONDS) -> tuple[Engine, WatchedModel]:
    model = prepare_model(tiny_model("llama"), word_tokenizer(), name="tiny", epoch=7)
    model.__class__ = WatchedModel
    assert isinstance(model, WatchedModel)
    model.watch()
    return Engine(model, EngineLimits(quick_seconds=quick_seconds)), model


def here() -> str:
    return threading.current_thread().name


async def decoded(engine: Engine, session_id: str, num_tokens: int) -> torch.Tensor:
    """Rows of a prompt of three tokens and so many single ones after it."""
    rows = [(await engine.step(StepCall(session_id, 0, [5, 6, 7], 1))).rows]
    for position in range(3, 3 + num_tokens):
        rows.append((await engine.step(StepCall(session_id, position, [2 + position % 50], 1))).rows)
    return torch.cat(rows)


async def test_a_session_that_is_alone_is_soon_run_here_and_gets_the_same_rows() -> None:
    (engine, model), (other, of_other) = watched_engine(), watched_engine(quick_seconds=0.0)
    async with engine, other:
        torch.testing.assert_close(
            await decoded(engine, "s", 40), await decoded(other, "s", 40), rtol=0, atol=0
        )
        threads = [name for name, _ in model.forwards]
        assert threads[:ALONE_STEPS] == ["engine"] * ALONE_STEPS
        assert threads[NUM_LEARNING:] == [here()] * (len(threads) - NUM_LEARNING)
        assert {name for name, _ in of_other.forwards} == {"engine"}


async def test_slow_long_and_drafting_steps_are_the_workers() -> None:
    engine, model = watched_engine(quick_seconds=1e-9)
    async with engine:
        await decoded(engine, "s", 40)
    assert {name for name, _ in model.forwards} == {"engine"}
    engine, model = watched_engine()
    async with engine:
        await decoded(engine, "s", 40)
        await engine.step(StepCall("s", 43, [3] * 9, 1))
        assert model.forwards[-1][0] == "engine"
        await engine.step(StepCall("s", 52, [3], 1))
        assert model.forwards[-1][0] == here()


async def test_sessions_that_decode_side_by_side_share_the_workers_forwards() -> None:
    engine, model = watched_engine()
    async with engine:
        await asyncio.gather(decoded(engine, "a", 40), decoded(engine, "b", 40))
        late = model.forwards[NUM_LEARNING:]
        assert {name for name, _ in late} == {"engine"}
        assert sum(count == 2 for _, count in late) > len(late) / 2


async def test_a_session_that_never_waits_lets_others_in() -> None:
    engine, _ = watched_engine()
    async with engine:
        await decoded(engine, "s", 40)
        turns = 0

        async def turning() -> None:
            nonlocal turns
            while True:
                turns += 1
                await asyncio.sleep(0)

        other = asyncio.create_task(turning())
        await asyncio.sleep(0)
        for position in range(43, 63):
            await engine.step(StepCall("s", position, [3], 1))
        other.cancel()
        assert turns > 8


async def test_a_quick_step_keeps_the_truth_table_and_fails_like_any_other() -> None:
    engine, model = watched_engine()
    async with engine:
        await decoded(engine, "s", 40)
        with pytest.raises(FusionRouteError) as ahead:
            await engine.step(StepCall("s", 60, [3], 1))
        assert ahead.value.reason is Reason.POSITION_AHEAD
        model.fails = True
        with pytest.raises(FusionRouteError) as failed:
            await engine.step(StepCall("s", 43, [3], 1))
        assert failed.value.reason is Reason.INTERNAL and model.forwards[-1][0] == here()
        model.fails = False
        assert (await engine.step(StepCall("s", 43, [3], 1))).position == 44


async def test_what_the_worker_was_asked_before_a_quick_step_is_done_before_it() -> None:
    engine, _ = watched_engine()
    async with engine:
        await decoded(engine, "s", 40)
        closing = asyncio.create_task(engine.close_session("s"))
        await asyncio.sleep(0)
        with pytest.raises(FusionRouteError) as unknown:
            await engine.step(StepCall("s", 43, [3], 1))
        assert unknown.value.reason is Reason.SESSION_UNKNOWN
        assert await closing


async def test_draining_waits_for_a_quick_step_and_stopping_leaves_none_unanswered() -> None:
    engine, _ = watched_engine()
    async with engine:
        await decoded(engine, "s", 40)
        last = [engine.submit(StepCall("s", 43, [3], 1)), engine.submit(StepCall("s", 44, [3], 1))]
        await engine.drain(5.0)
        assert [(await each).position for each in last] == [44, 45]
    engine, _ = watched_engine()
    async with engine:
        await decoded(engine, "s", 40)
        late = [engine.submit(StepCall("s", 43, [3], 1)), engine.submit(StepCall("s", 44, [3], 1))]
    assert (await late[0]).position == 44
    with pytest.raises(FusionRouteError) as stopped:
        await late[1]
    assert stopped.value.reason is Reason.DRAINING
