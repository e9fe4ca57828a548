"""A stretch of bad network between a client and Redis."""

import asyncio
import contextlib
from pathlib import Path
from types import TracebackType
from typing import Self


class LossyProxy:
    """Passes bytes between clients of its socket and Redis, and loses answers on demand.

    `answers_to_lose`: so many of the next commands reach Redis, but their connection breaks, unanswered.
    `is_mute`: connections stay open, but no answer comes back.
    `is_down`: connections break at once.
    """

    def __init__(self, redis_url: str, folder: Path) -> None:
        self._redis_path = redis_url.removeprefix("unix://")
        self._path = folder / "proxy.sock"
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._writers: set[asyncio.StreamWriter] = set()
        self.answers_to_lose = 0
        self.is_mute = False
        self.is_down = False
        self.num_commands = 0
        self.num_lost = 0

    @property
    def url(self) -> str:
        return f"unix://{self._path}"

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_unix_server(self._accept, self._path)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._server is not None
        self._server.close()
        for writer in self._writers:
            writer.close()
        await asyncio.gather(*self._tasks)
        await self._server.wait_closed()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        self._writers.add(writer)
        with contextlib.suppress(ConnectionError):
            await self._pass_on(reader, writer)
        self._writers.discard(writer)
        writer.close()

    async def _pass_on(self, client: asyncio.StreamReader, to_client: asyncio.StreamWriter) -> None:
        """Passes on both directions until either ends, then closes both."""
        if self.is_down:
            return
        redis, to_redis = await asyncio.open_unix_connection(self._redis_path)
        is_losing = asyncio.Event()
        try:
            answers = asyncio.create_task(self._answers(redis, to_client, is_losing))
            commands = asyncio.create_task(self._commands(client, to_redis, is_losing))
            await asyncio.wait([answers, commands], return_when=asyncio.FIRST_COMPLETED)
        finally:
            to_redis.close()
            to_client.close()
        await asyncio.gather(answers, commands, return_exceptions=True)

    async def _commands(
        self, client: asyncio.StreamReader, to_redis: asyncio.StreamWriter, is_losing: asyncio.Event
    ) -> None:
        while (data := await client.read(1 << 20)) and not self.is_down:
            self.num_commands += 1
            if self.answers_to_lose > 0 and b"EVALSHA" in data:
                self.answers_to_lose -= 1
                is_losing.set()
            to_redis.write(data)

    async def _answers(
        self, redis: asyncio.StreamReader, to_client: asyncio.StreamWriter, is_losing: asyncio.Event
    ) -> None:
        while data := await redis.read(1 << 20):
            if is_losing.is_set():
                self.num_lost += 1
                return
            if not self.is_mute:
                to_client.write(data)
