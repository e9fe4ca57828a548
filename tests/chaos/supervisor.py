"""Processes that are started again when they end, as under `restart: on-failure`, and gone for certain at the end."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from fusionroute.background import end_task
from tests.chaos.spawning import Running

RESTART_PAUSE_SECONDS = 0.1
STOP_SECONDS = 6.0

@dataclass(frozen=True, slots=True)
class Death:
    """How a process ended: its exit code, negative for a signal."""

    at: float
    code: int


@dataclass(slots=True, eq=False)
class Supervised:
    """A program that is kept running.

    Attributes:
        name: for people.
        spawn: starts a process.
        log: what all its processes have written.
        ready: returns where it serves, once it does; None before.
        forget_ready: takes that back, when the process has ended.
    """

    name: str
    spawn: Callable[[], Awaitable[Running]]
    log: Path
    ready: Callable[[], str | None]
    forget_ready: Callable[[], None]
    deaths: list[Death] = field(default_factory=list)
    pids: list[int] = field(default_factory=list)
    addresses: set[str] = field(default_factory=set)
    """At which it has ever served, as far as anybody asked."""
    before_start: Callable[[], Awaitable[None]] | None = None
    """Awaited between a death and the next start, once."""
    _process: Running | None = None
    _task: asyncio.Task[None] | None = None

    @property
    def address(self) -> str | None:
        """Where it serves now; None while it does not."""
        address = self.ready() if self._process is not None else None
        if address is not None:
            self.addresses.add(address)
        return address

    def start(self) -> None:
        """Keeps it running from now on."""
        assert self._task is None, "already started"
        self._task = asyncio.create_task(self._keep_running(), name=f"keep {self.name}")

    async def until_ready(self, timeout_seconds: float) -> str:
        """Where it serves, once it does. TimeoutError, with the end of its log, when it does not."""
        deadline = time.monotonic() + timeout_seconds
        while (address := self.address) is None:
            if time.monotonic() > deadline:
                tail = self.log.read_text(errors="replace")[-1500:] if self.log.exists() else ""
                raise TimeoutError(f"{self.name} is not ready after {timeout_seconds:g} s:\n{tail}")
            await asyncio.sleep(0.02)
        return address

    def signal(self, number: signal.Signals) -> None:
        """Sends a signal to the process, if there is one now."""
        if self._process is not None and self._process.returncode is None:
            with suppress(ProcessLookupError):
                self._process.send_signal(number)

    async def until_dead(self, timeout_seconds: float) -> None:
        """Returns when the process that runs now has ended."""
        process = self._process
        if process is not None:
            async with asyncio.timeout(timeout_seconds):
                await process.wait()

    async def close(self) -> None:
        """Ends it: gently, then by force."""
        if self._task is not None:
            await end_task(self._task)
            self._task = None
        if self._process is None:
            return
        self.signal(signal.SIGCONT)
        self.signal(signal.SIGTERM)
        try:
            await self.until_dead(STOP_SECONDS)
        except TimeoutError:
            self.signal(signal.SIGKILL)
            await self.until_dead(STOP_SECONDS)
        for pid in self.pids:
            for process in members(pid):
                with suppress(psutil.NoSuchProcess):
                    process.kill()
        self.forget_ready()

    async def _keep_running(self) -> None:
        while True:
            self._process = await self.spawn()
            self.pids.append(self._process.pid)
            code = await self._process.wait()
            self.forget_ready()
            self.deaths.append(Death(time.monotonic(), code))
            await asyncio.sleep(RESTART_PAUSE_SECONDS)
            if self.before_start is not None:
                action, self.before_start = self.before_start, None
                await action()


def members(pid: int) -> list[psutil.Process]:
    """The processes of the session that a supervised process had begun, itself included."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.NoSuchProcess, ProcessLookupError, PermissionError):
            if os.getsid(process.pid) == pid and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found
