"""Between event loops and the engine's worker thread: what arrives, and what goes back.

A thread is woken once for all that has come together: the worker by one blocking read, an event loop by one call for
all futures that a forward has settled.
"""

from __future__ import annotations

from asyncio import AbstractEventLoop, Future
from queue import Empty, SimpleQueue
from typing import Any, Generic, TypeVar

T = TypeVar("T")

Settled = tuple["Future[Any]", object, BaseException | None]


class Inbox(Generic[T]):
    """What event loops hand to the worker."""

    def __init__(self) -> None:
        self._queue: SimpleQueue[T] = SimpleQueue()

    def put(self, item: T) -> None:
        """Hands over; wakes the worker."""
        self._queue.put(item)

    def take(self, wait_seconds: float | None) -> list[T]:
        """All that has arrived.

        Args:
            wait_seconds: for the first of it, when nothing has arrived yet; None = until something does.
        """
        items: list[T] = []
        if wait_seconds is None or wait_seconds > 0.0:
            try:
                items.append(self._queue.get(timeout=wait_seconds))
            except Empty:
                return items
        while not self._queue.empty():  # the worker is the only reader
            items.append(self._queue.get_nowait())
        return items


class Answers:
    """Futures that the worker has settled and their event loops do not know yet."""

    def __init__(self) -> None:
        self._by_loop: dict[AbstractEventLoop, list[Settled]] = {}

    def add(self, future: Future[Any], result: object, error: BaseException | None = None) -> None:
        """Settles a future with a result or an error; nothing happens before `deliver`."""
        self._by_loop.setdefault(future.get_loop(), []).append((future, result, error))

    def deliver(self) -> None:
        """Wakes each event loop once."""
        if not self._by_loop:
            return
        by_loop, self._by_loop = self._by_loop, {}
        for loop, settled in by_loop.items():
            try:
                loop.call_soon_threadsafe(_settle, settled)
            except RuntimeError:  # closed: nobody waits there any more
                continue


def _settle(settled: list[Settled]) -> None:
    for future, result, error in settled:
        if future.done():
            continue
        if error is None:
            future.set_result(result)
        else:
            future.set_exception(error)
