"""What forwards and closed sessions leave in the heap goes back to the system once an engine is quiet."""

from __future__ import annotations

import asyncio
import time

import psutil
import pytest

from fusionroute.engine import Engine, EngineLimits, StepCall, idle_heap, prepare_model
from fusionroute.engine.idle_heap import LEAST_TOKENS, IdleHeap, heap_trimmer
from tests.tiny_models import MAX_CONTEXT, tiny_model, word_tokenizer


@pytest.fixture
def trims(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """When the heap was trimmed."""
    moments: list[float] = []

    def trim(pad: int) -> int:
        moments.append(time.monotonic())
        return 0

    monkeypatch.setattr(idle_heap, "heap_trimmer", lambda: trim)
    return moments


def test_only_long_forwards_and_closed_sessions_leave_gaps(trims: list[float]) -> None:
    heap = IdleHeap()
    assert heap.wait_seconds(0) is None
    heap.computed(LEAST_TOKENS - 1)
    assert heap.wait_seconds(3) is None, "sessions that are new leave none"
    heap.computed(1)
    assert heap.wait_seconds(3) == idle_heap.QUIET_SECONDS
    heap.trim(3)
    assert heap.wait_seconds(3) is None and len(trims) == 1
    assert heap.wait_seconds(2) is not None


async def test_an_engine_trims_once_when_it_is_quiet_and_works_on(trims: list[float]) -> None:
    model = prepare_model(tiny_model("llama"), word_tokenizer(), name="tiny")
    async with Engine(model, EngineLimits()) as engine:
        for number in range(LEAST_TOKENS // MAX_CONTEXT + 2):
            await engine.step(StepCall(f"s{number}", 0, [5 + number] * MAX_CONTEXT, 1))
        began = time.monotonic()
        async with asyncio.timeout(20):
            while not trims:
                await asyncio.sleep(0.02)
        assert trims[0] - began >= 0.9 * idle_heap.QUIET_SECONDS
        await asyncio.sleep(2 * idle_heap.QUIET_SECONDS)
        assert len(trims) == 1, "nothing has changed since"
        await engine.close_session("s0")
        async with asyncio.timeout(20):
            while len(trims) < 2:
                await asyncio.sleep(0.02)
        assert (await engine.step(StepCall("after", 0, [5, 6], 1))).position == 2


@pytest.mark.skipif(heap_trimmer() is None, reason="only glibc gives free memory back on demand")
def test_free_memory_goes_back_to_the_system() -> None:
    trim = heap_trimmer()
    assert trim is not None
    kept: list[bytes] = []
    for _ in range(20_000):  # of each two pieces one lives on: the heap cannot shrink from its end
        piece, keep = bytes(4000), bytes(40)
        kept.append(keep + piece[:1])
        kept.append(piece)
    del kept[1::2]
    full = psutil.Process().memory_full_info().uss
    trim(0)
    assert len(kept) == 20_000
    assert full - psutil.Process().memory_full_info().uss > 20e6
