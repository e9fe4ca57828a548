"""The services as the programs they are: started, watched, signalled, read."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from tests.expert_fakes import until

START_SECONDS = 60


class Daemon:
    """A running service."""

    def __init__(self, process: asyncio.subprocess.Process, ready_file: Path) -> None:
        self.process = process
        self.ready_file = ready_file

    @property
    def has_begun(self) -> bool:
        """Whether it serves, or has ended instead."""
        return self.ready_file.exists() or self.process.returncode is not None

    async def address(self) -> str:
        """host:port, once it serves."""
        await until(lambda: self.has_begun, START_SECONDS)
        assert self.process.returncode is None, await self.output()
        return self.ready_file.read_text().strip()

    async def output(self) -> str:
        """What it has written, once it has ended."""
        async with asyncio.timeout(START_SECONDS):
            output, _ = await self.process.communicate()
        return output.decode()


@asynccontextmanager
async def daemon(module: str, folder: Path, *options: str, **environment: str) -> AsyncIterator[Daemon]:
    """`python -m module` on a free port (unless the options name one), killed at the end if it still runs."""
    folder.mkdir(exist_ok=True)
    ready_file = folder / f"{module}-ready"
    ready_file.unlink(missing_ok=True)
    inherited = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("FUSIONROUTE_") and name != "REDIS_URL"
    }
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", module, "--port", "0", "--threads", "1", "--log-format", "json",
        "--ready-file", str(ready_file), *options,
        env=inherited | environment,
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
    )  # fmt: skip
    try:
        yield Daemon(process, ready_file)
    finally:
        if process.returncode is None:
            process.kill()
            await process.communicate()


def events(output: str) -> dict[str, dict[str, Any]]:
    """The JSON events of a log, by name."""
    parsed = [json.loads(line) for line in output.splitlines() if line.startswith("{")]
    return {event["event"]: event for event in parsed}
