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
SettledByLoop = dict[AbstractEventLoop, list[Settled]]


class Inbox(Generic[T]):
    """What event loops hand to the worker.

    Attributes:
        num_put: items that were ever handed over.
    """

    def __init__(self) -> None:
        self._queue: SimpleQueue[T] = SimpleQueue()
        self.num_put = 0

    def put(self, item: T) -> None:
        """Hands over; wakes the worker."""
        self.num_put += 1
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
    """Futures that a turn of work has settled and their event loops do not know yet."""

    def __init__(self) -> None:
        self._by_loop: SettledByLoop = {}

    def add(self, future: Future[Any], result: object, error: BaseException | None = None) -> None:
        """Settles a future with a result or an error; nothing happens before it is delivered."""
        self._by_loop.setdefault(future.get_loop(), []).append((future, result, error))

    def take(self) -> SettledByLoop:
        """All of them, to be delivered."""
        taken, self._by_loop = self._by_loop, {}
        return taken


def deliver(settled: SettledByLoop) -> None:
    """Wakes each event loop once."""
    for loop, of_loop in settled.items():
        try:
            loop.call_soon_threadsafe(settle, of_loop)
        except RuntimeError:  # closed: nobody waits there any more
            continue


def settle(settled: list[Settled]) -> None:
    """To be called in the thread of the futures' event loop."""
    for future, result, error in settled:
        if future.done():
            continue
        if error is None:
            future.set_result(result)
        else:
            future.set_exception(error)
