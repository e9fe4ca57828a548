"""Whether the client is still there: what is done for one that has left is given up."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from starlette.types import Receive

from fusionroute.background import end_task


class ClientGone(Exception):
    """The client has closed the connection; nobody reads an answer."""


@asynccontextmanager
async def unless_gone(receive: Receive) -> AsyncIterator[None]:
    """Cancels what the block waits for when the client leaves.

    Args:
        receive: of the request, whose body has been read.

    Raises:
        ClientGone: instead of the block's cancellation.
    """
    task = asyncio.current_task()
    assert task is not None
    is_gone, cancellations_before = False, task.cancelling()

    async def watch() -> None:
        nonlocal is_gone
        while (await receive())["type"] != "http.disconnect":
            pass
        is_gone = True
        task.cancel()

    watcher = asyncio.create_task(watch(), name="http presence")
    try:
        yield
        if is_gone:  # while the last step was done: the cancellation arrives with the next wait
            await asyncio.sleep(0)
    except asyncio.CancelledError:
        if is_gone and task.uncancel() <= cancellations_before:
            raise ClientGone from None
        raise
    finally:
        await end_task(watcher)
