"""Ending tasks that run in the background."""

from __future__ import annotations

import asyncio
from typing import Any


async def end_task(task: asyncio.Task[Any], *, patience_seconds: float = 0.5) -> None:
    """Cancels a task, again and again if need be, and returns once it has ended.

    One cancellation is not always enough: `asyncio.wait_for` of Python 3.11, which client libraries use, drops one
    that arrives together with its result.

    Args:
        task: its outcome is not looked at.
        patience_seconds: how long it may clean up before it is cancelled anew.
    """
    while not task.done():
        task.cancel()
        await asyncio.wait([task], timeout=patience_seconds)
