"""What Redis with `appendfsync everysec` does when the machine's power fails: it forgets a second.

A killed process loses nothing, since the kernel has its writes. So copies of its files are taken all the time, and the
one of a second ago is put back.
"""

from __future__ import annotations

import asyncio
import shutil
import signal
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self

from fusionroute.background import end_task
from tests.chaos.stack import ChaosStack
from tests.chaos.supervisor import Supervised

LOST_SECONDS = 1.0
INTERVAL_SECONDS = 0.2
NUM_KEPT = 12
DEADLINE_SECONDS = 10.0


@dataclass(slots=True, eq=False)
class RedisPast:
    """Keeps the past while its context lasts."""

    stack: ChaosStack
    _copies: list[tuple[float, int, Path]] = field(default_factory=list)
    """When, how many tokens were stored then, and the files."""
    _task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        self._task = asyncio.create_task(self._keep(), name="redis past")
        async with asyncio.timeout(DEADLINE_SECONDS):
            while not self._copies:
                await asyncio.sleep(0.02)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._task is not None:
            await end_task(self._task)
        for _, _, folder in self._copies:
            shutil.rmtree(folder, ignore_errors=True)

    async def put_back(self, redis: Supervised) -> str:
        """Kills Redis and starts it with its files of a second ago. Returns how many tokens that has cost."""
        async with asyncio.timeout(DEADLINE_SECONDS):
            while time.monotonic() - self._copies[0][0] < LOST_SECONDS:
                await asyncio.sleep(0.02)
        assert self._task is not None
        await end_task(self._task)
        now = time.monotonic()
        at, num_then, folder = [copy for copy in self._copies if now - copy[0] >= LOST_SECONDS][-1]
        num_now = await self._num_tokens()

        async def go_back() -> None:
            shutil.rmtree(self.stack.redis_data)
            shutil.copytree(folder, self.stack.redis_data)

        redis.before_start = go_back
        redis.signal(signal.SIGKILL)
        await redis.until_dead(5.0)
        return f"{num_now - num_then} tokens of {now - at:.1f} s lost"

    async def _keep(self) -> None:
        number = 0
        while True:
            number += 1
            folder = self.stack.redis_data.with_name(f"redis-past-{number}")
            at, num_tokens = time.monotonic(), await self._num_tokens()
            with suppress(shutil.Error):  # a file may be replaced while it is copied
                await asyncio.to_thread(shutil.copytree, self.stack.redis_data, folder)
                self._copies.append((at, num_tokens, folder))
            for _, _, old in self._copies[:-NUM_KEPT]:
                shutil.rmtree(old, ignore_errors=True)
            del self._copies[:-NUM_KEPT]
            await asyncio.sleep(INTERVAL_SECONDS)

    async def _num_tokens(self) -> int:
        async with self.stack.store() as redis:
            return sum([await redis.strlen(key) // 16 async for key in redis.scan_iter("fr:*:tok")])
