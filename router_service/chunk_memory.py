"""How much memory rows of prompts being scored may take at a time, shared out by what each chunk needs."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


class ChunkMemory:
    """Bytes that chunks hold while their rows are there: many small ones at a time, few large ones.

    Args:
        total_bytes: of all chunks together; a chunk that needs more than this runs alone.
    """

    def __init__(self, total_bytes: int) -> None:
        self._total_bytes = self._free_bytes = total_bytes
        self._waiting: deque[tuple[int, asyncio.Future[None]]] = deque()

    @asynccontextmanager
    async def held(self, num_bytes: int) -> AsyncIterator[None]:
        """So many bytes for as long as the block lasts, once they are free; first come, first served."""
        wanted = min(num_bytes, self._total_bytes)
        await self._take(wanted)
        try:
            yield
        finally:
            self._give_back(wanted)

    async def _take(self, num_bytes: int) -> None:
        if not self._waiting and num_bytes <= self._free_bytes:
            self._free_bytes -= num_bytes
            return
        turn = asyncio.get_running_loop().create_future()
        entry = (num_bytes, turn)
        self._waiting.append(entry)
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self._give_back(num_bytes)  # they had just been given
            else:
                self._waiting.remove(entry)
                self._give_back(0)  # whoever stands behind may fit
            raise

    def _give_back(self, num_bytes: int) -> None:
        self._free_bytes += num_bytes
        while self._waiting and self._waiting[0][0] <= self._free_bytes:
            taken, turn = self._waiting.popleft()
            self._free_bytes -= taken
            turn.set_result(None)
