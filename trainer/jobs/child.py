"""A job's process as the supervisor holds it: started in a session of its own, asked to stop, ended for certain."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from trainer.jobs.folder import JobFolder
from trainer.jobs.leftovers import MARK, end_processes

JOB_COMMAND = (sys.executable, "-m", "trainer.jobs.process")
"""What stands before the folder on a job's command line."""


class JobProcess:
    """A running or ended process."""

    def __init__(self, process: asyncio.subprocess.Process, folder: Path) -> None:
        self._process = process
        self._folder = folder

    @classmethod
    async def start(
        cls, command: Sequence[str], folder: JobFolder, environment: Mapping[str, str] | None = None
    ) -> JobProcess:
        """Starts `command` for a folder, its output appended to the folder's log. Raises OSError.

        Args:
            environment: added to that of this process.
        """
        with folder.log.open("ab") as log:
            process = await asyncio.create_subprocess_exec(
                *command,
                str(folder.path),
                stdin=asyncio.subprocess.PIPE,
                stdout=log,
                stderr=log,
                env={**os.environ, **(environment or {}), MARK: str(folder.path), "PYTHONUNBUFFERED": "1"},
                start_new_session=True,
            )
        return cls(process, folder.path)

    @property
    def pid(self) -> int:
        """Of the process, and of its session and group."""
        return self._process.pid

    async def wait(self) -> int:
        """How it ended, once it has; a negated signal number when killed by one."""
        return await self._process.wait()

    def ask_to_stop(self, *, save: bool) -> None:
        """Asks it to stop at its next step; it has ended already = fine."""
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):
            self._process.stdin.write(b"save\n" if save else b"discard\n")

    def kill(self) -> None:
        """Ends it and its group at once."""
        if self._process.returncode is not None:
            return  # its number may be another's by now
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)

    async def end(self) -> None:
        """Returns once neither it nor anything it has started runs."""
        self.kill()
        await self._process.wait()
        await asyncio.to_thread(end_processes, self._folder)
