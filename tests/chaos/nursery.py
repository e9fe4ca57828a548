"""Starts daemons in a moment: a process that has imported everything once and forks one for each request.

What runs is the daemon's own command line in a process of its own, as ever; only the seconds of importing are
saved. Run as a program it obeys lines of JSON on standard input and tells of births and deaths on standard output.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import json
import os
import runpy
import select
import signal
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tests.chaos.spawning import Running, exec_tied

READY_SECONDS = 120.0
FORK_SECONDS = 30.0


@dataclass(slots=True, eq=False)
class Nursery:
    """The asking side. Use as an asynchronous context manager; all children die with it."""

    _process: asyncio.subprocess.Process | None = None
    _reader: asyncio.Task[None] | None = None
    _births: dict[int, asyncio.Future[int]] = field(default_factory=dict)
    _deaths: dict[int, asyncio.Future[int]] = field(default_factory=dict)
    _num_asked: int = 0

    async def __aenter__(self) -> Self:
        self._process = await exec_tied(
            [sys.executable, "-m", "tests.chaos.nursery"],
            {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"},
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
        )
        assert self._process.stdout is not None
        async with asyncio.timeout(READY_SECONDS):
            assert json.loads(await self._process.stdout.readline()) == {"ready": True}
        self._reader = asyncio.create_task(self._listen(self._process.stdout), name="nursery")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._process is not None and self._process.stdin is not None and self._reader is not None
        self._process.stdin.close()
        try:
            async with asyncio.timeout(5.0):
                await self._process.wait()
        except TimeoutError:
            self._process.kill()
            await self._process.wait()
        await self._reader

    async def spawn(
        self, module: str, arguments: Sequence[str], environment: Mapping[str, str], log: Path
    ) -> Running:
        """`python -m module arguments`, its output appended to `log`."""
        assert self._process is not None and self._process.stdin is not None
        self._num_asked += 1
        number = self._num_asked
        born = self._births[number] = asyncio.get_running_loop().create_future()
        asked = {
            "number": number,
            "module": module,
            "arguments": list(arguments),
            "environment": dict(environment),
            "log": str(log),
        }
        self._process.stdin.write(json.dumps(asked).encode() + b"\n")
        async with asyncio.timeout(FORK_SECONDS):
            pid = await born
        return _Child(pid, self._deaths[pid])

    async def _listen(self, lines: asyncio.StreamReader) -> None:
        while line := await lines.readline():
            told = json.loads(line)
            if "number" in told:
                self._deaths[told["pid"]] = asyncio.get_running_loop().create_future()
                self._births.pop(told["number"]).set_result(told["pid"])
            else:
                self._deaths[told["pid"]].set_result(told["code"])
        for death in self._deaths.values():
            if not death.done():
                death.set_result(-signal.SIGKILL)


@dataclass(frozen=True, slots=True)
class _Child:
    pid: int
    _death: asyncio.Future[int]

    @property
    def returncode(self) -> int | None:
        """None while it runs."""
        return self._death.result() if self._death.done() else None

    def send_signal(self, number: signal.Signals) -> None:
        """Only to a process that has not been waited for yet, so that its pid is its own."""
        if not self._death.done():
            os.kill(self.pid, number)

    async def wait(self) -> int:
        """Its exit code once it has ended."""
        return await asyncio.shield(self._death)


def serve() -> None:
    """The forking side, until standard input ends."""
    import router_service.bootstrap  # noqa: F401 - all is imported once, for all children
    import tests.tiny_models  # noqa: F401 - and the models' classes with it

    woken, wake = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda number, frame: None)
    _tell(ready=True)
    pending = b""
    while True:
        readable, _, _ = select.select([0, woken], [], [])
        if woken in readable:
            os.read(woken, 4096)
            _reap()
        if 0 in readable:
            data = os.read(0, 1 << 16)
            if not data:
                return
            *lines, pending = (pending + data).split(b"\n")
            for line in lines:
                _fork(json.loads(line), (woken, wake))


def _fork(asked: Mapping[str, Any], unwanted: Sequence[int]) -> None:
    mother = os.getpid()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            for number in unwanted:
                os.close(number)
            code = _live(asked, mother)
        finally:
            os._exit(code)
    _tell(number=asked["number"], pid=pid)


def _live(asked: Mapping[str, Any], mother: int) -> int:
    """The life of a child: becomes a session of its own, tied to the nursery, and runs the daemon's main module."""
    os.setsid()
    ctypes.CDLL(None).prctl(1, int(signal.SIGKILL), 0, 0, 0)
    if os.getppid() != mother:
        return 1
    log = os.open(asked["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for source, target in ((nothing, 0), (log, 1), (log, 2)):
        os.dup2(source, target)
    os.environ.update(asked["environment"])
    sys.argv = [asked["module"], *asked["arguments"]]
    try:
        runpy.run_module(asked["module"], run_name="__main__", alter_sys=True)
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:
        import traceback

        traceback.print_exc()
        return 1
    finally:
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
            sys.stderr.flush()
    return 0


def _reap() -> None:
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if pid == 0:
            return
        _tell(pid=pid, code=os.waitstatus_to_exitcode(status))


def _tell(**what: Any) -> None:
    os.write(1, json.dumps(what).encode() + b"\n")


if __name__ == "__main__":
    serve()
