"""Ending a task that drops a cancellation."""

from __future__ import annotations

import asyncio
from contextlib import suppress

from fusionroute.background import end_task


async def test_a_task_that_drops_a_cancellation_is_cancelled_again() -> None:
    drops = 2

    async def stubborn() -> None:
        nonlocal drops
        while True:
            try:
                await asyncio.sleep(60)
            except asyncio.CancelledError:
                if not drops:
                    raise
                drops -= 1

    task = asyncio.create_task(stubborn())
    await asyncio.sleep(0)
    async with asyncio.timeout(5):
        await end_task(task, patience_seconds=0.01)
    assert task.cancelled()
    assert drops == 0


async def test_a_task_may_clean_up_in_peace_and_may_be_over_already() -> None:
    cleaned = False

    async def tidy() -> None:
        nonlocal cleaned
        with suppress(asyncio.CancelledError):
            await asyncio.sleep(60)
        await asyncio.sleep(0.05)
        cleaned = True

    task = asyncio.create_task(tidy())
    await asyncio.sleep(0)
    await end_task(task)
    assert cleaned
    await end_task(task)
