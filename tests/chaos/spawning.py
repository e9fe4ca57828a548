"""How a process comes into being: executed anew, tied to this process by the kernel."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from typing import IO, Any, Protocol

# Becomes the program it is told to start, after asking the kernel for SIGKILL when the parent dies: that one
# reaches a process that is stopped by SIGSTOP as well.
_TIED = (
    "import ctypes, os, sys\n"
    "ctypes.CDLL(None).prctl(1, 9, 0, 0, 0)\n"
    "os.getppid() == int(sys.argv[1]) or sys.exit('the parent is gone')\n"
    "os.execv(sys.argv[2], sys.argv[2:])\n"
)


class Running(Protocol):
    """A process that was started."""

    @property
    def pid(self) -> int:
        """Also the id of its session."""

    @property
    def returncode(self) -> int | None:
        """None while it runs."""

    def send_signal(self, number: signal.Signals) -> None:
        """May raise ProcessLookupError."""

    async def wait(self) -> int:
        """Its exit code once it has ended; negative for a signal."""


async def exec_tied(
    command: Sequence[str],
    environment: Mapping[str, str],
    *,
    stdin: int | None = asyncio.subprocess.DEVNULL,
    stdout: int | IO[Any] | None = None,
    stderr: int | IO[Any] | None = None,
) -> asyncio.subprocess.Process:
    """Starts a program (absolute path) in a session of its own; it is killed when this one ends, however it ends."""
    inherited = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("FUSIONROUTE_") and name != "REDIS_URL"
    }
    return await asyncio.create_subprocess_exec(
        sys.executable, "-I", "-S", "-c", _TIED, str(os.getpid()), *command,
        env=inherited | dict(environment),
        stdin=stdin, stdout=stdout, stderr=stderr, start_new_session=True,
    )  # fmt: skip
