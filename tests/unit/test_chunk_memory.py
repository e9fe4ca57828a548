"""Memory of prompts being scored: many small chunks at a time, few large ones, in the order they came."""

from __future__ import annotations

import asyncio

from router_service.chunk_memory import ChunkMemory


class Chunks:
    """Chunks that hold their bytes until they are let go."""

    def __init__(self, total_bytes: int) -> None:
        self.memory = ChunkMemory(total_bytes)
        self.running: list[str] = []
        self.tasks: dict[str, asyncio.Task[None]] = {}
        self._leave: dict[str, asyncio.Event] = {}

    async def come(self, name: str, num_bytes: int) -> None:
        self._leave[name] = asyncio.Event()

        async def hold() -> None:
            async with self.memory.held(num_bytes):
                self.running.append(name)
                try:
                    await self._leave[name].wait()
                finally:
                    self.running.remove(name)

        self.tasks[name] = asyncio.create_task(hold())
        await asyncio.sleep(0)
        await asyncio.sleep(0)

    async def leave(self, name: str) -> None:
        self._leave[name].set()
        await self.tasks[name]
        await asyncio.sleep(0)
        await asyncio.sleep(0)


async def test_small_chunks_run_together_and_a_large_one_waits_for_its_turn() -> None:
    chunks = Chunks(10)
    for number in range(9):
        await chunks.come(f"small {number}", 1)
    assert len(chunks.running) == 9
    await chunks.come("large", 4)
    await chunks.come("late", 1)
    assert "large" not in chunks.running and "late" not in chunks.running, "nobody overtakes"
    for number in range(3):
        await chunks.leave(f"small {number}")
    assert "large" in chunks.running and "late" not in chunks.running
    await chunks.leave("large")
    assert "late" in chunks.running


async def test_what_is_larger_than_all_runs_alone() -> None:
    chunks = Chunks(10)
    await chunks.come("huge", 99)
    await chunks.come("small", 1)
    assert chunks.running == ["huge"]
    await chunks.leave("huge")
    assert chunks.running == ["small"]


async def test_a_chunk_that_gives_up_waiting_lets_those_behind_it_in() -> None:
    chunks = Chunks(10)
    await chunks.come("first", 6)
    await chunks.come("large", 9)
    await chunks.come("small", 4)
    assert chunks.running == ["first"]
    chunks.tasks["large"].cancel()
    for _ in range(4):
        await asyncio.sleep(0)
    assert chunks.running == ["first", "small"]
    await chunks.leave("first")
    await chunks.leave("small")
    await chunks.come("all", 10)
    assert chunks.running == ["all"], "nothing was lost"


async def test_a_chunk_cancelled_as_it_is_let_in_gives_its_bytes_back() -> None:
    memory = ChunkMemory(10)
    async with memory.held(10):
        waiting = asyncio.create_task(memory.held(10).__aenter__())
        await asyncio.sleep(0)
    waiting.cancel()  # its turn has just been given, it has not run yet
    await asyncio.gather(waiting, return_exceptions=True)
    async with asyncio.timeout(1), memory.held(10):
        pass
