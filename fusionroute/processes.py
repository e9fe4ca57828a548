"""Child processes that do not outlive their purpose: started apart, recognised again, stopped for certain.

A pid alone proves nothing, since pids are used again; so each process is remembered with the moment of its
start, and nothing is signalled unless both fit.
"""

from __future__ import annotations

import os
import signal
import sys
import sysconfig
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

# Becomes the program it is told to start, after asking the kernel for a signal when the parent dies. As a
# program of its own it runs no Python between fork and exec of a parent that has threads.
_DIE_WITH_PARENT = (
    "import ctypes, os, signal, sys\n"
    "ctypes.CDLL(None).prctl(1, signal.SIGTERM)\n"
    "os.getppid() == int(sys.argv[1]) or sys.exit(1)\n"
    "os.execv(sys.argv[2], sys.argv[2:])\n"
)


@dataclass(frozen=True, slots=True)
class ProcessRecord:
    """A process that was started, as it can be written down and found again."""

    name: str
    pid: int
    # when it started, in the words of the kernel; together with the pid it is unique
    start_mark: str
    log: Path
    command: tuple[str, ...]


def program(name: str) -> str:
    """Path of an installed console script of this very environment.

    Raises:
        FileNotFoundError: the environment has no such script.
    """
    path = Path(sysconfig.get_path("scripts")) / name
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist: install fusionroute into this environment")
    return str(path)


def spawn(
    name: str,
    command: Sequence[str],
    *,
    log: Path,
    environment: Mapping[str, str | None],
    die_with_parent: bool,
) -> ProcessRecord:
    """Starts a process in a session of its own, its output appended to `log`.

    Args:
        name: what people call it.
        command: program (absolute path) and arguments.
        log: receives standard output and standard error.
        environment: added to the environment of this process; None takes a variable out of it.
        die_with_parent: on Linux the kernel sends it SIGTERM when the thread that calls this ends.

    Raises:
        OSError: the program cannot be started or the log cannot be written.
    """
    argv = list(command)
    if die_with_parent and sys.platform == "linux":
        argv = [sys.executable, "-I", "-S", "-c", _DIE_WITH_PARENT, str(os.getpid()), *argv]
    log.parent.mkdir(parents=True, exist_ok=True)
    append = os.O_WRONLY | os.O_CREAT | os.O_APPEND
    pid = os.posix_spawn(
        argv[0],
        argv,
        {name: value for name, value in {**os.environ, **environment}.items() if value is not None},
        file_actions=[
            (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
            (os.POSIX_SPAWN_OPEN, 1, str(log), append, 0o600),
            (os.POSIX_SPAWN_DUP2, 1, 2),
        ],
        setsid=True,
    )
    return ProcessRecord(name, pid, start_mark(pid), log, tuple(command))


def exit_code(record: ProcessRecord) -> int | None:
    """How a child of this process ended (a negated signal number when killed by one); None if unknown."""
    try:
        return psutil.Process(record.pid).wait(timeout=0)
    except (psutil.NoSuchProcess, psutil.TimeoutExpired):
        return None


def start_mark(pid: int) -> str:
    """When a process started, in a form that clock changes do not move; empty when there is none."""
    stat = Path(f"/proc/{pid}/stat")
    try:
        # the name, field 2, may hold blanks and brackets; field 22 is the start in ticks since boot
        ticks = stat.read_text().rpartition(")")[2].split()[19]
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()}:{ticks}"
    except (FileNotFoundError, ProcessLookupError):
        pass
    if Path("/proc/self/stat").exists():
        return ""
    try:
        return str(psutil.Process(pid).create_time())
    except psutil.NoSuchProcess:
        return ""


def find(record: ProcessRecord) -> psutil.Process | None:
    """The running process of a record, or None when it has ended or its pid belongs to another now."""
    try:
        process = psutil.Process(record.pid)
        if process.status() == psutil.STATUS_ZOMBIE or start_mark(record.pid) != record.start_mark:
            return None
    except psutil.NoSuchProcess:
        return None
    return process


def stop(records: Sequence[ProcessRecord], deadline_seconds: float) -> list[str]:
    """Asks processes to end, waits, and kills what is left, the descendants of each included.

    Returns:
        The names of those that had to be killed.
    """
    members = [(record.name, process) for record in records for process in session_members(record)]
    for record in records:
        if (leader := find(record)) is not None:
            _signal(leader, signal.SIGTERM)
    _, alive = psutil.wait_procs([process for _, process in members], timeout=deadline_seconds)
    for process in alive:
        _signal(process, signal.SIGKILL)
    psutil.wait_procs(alive, timeout=5.0)
    return sorted({name for name, process in members if process in alive})


def session_members(record: ProcessRecord) -> list[psutil.Process]:
    """The process of a record and all that it started, also when it has ended itself without them."""
    if start_mark(record.pid) not in ("", record.start_mark):
        return []  # the pid belongs to another process now, and so does the session of that number
    return [process for process in psutil.process_iter() if _session_of(process) == record.pid]


def wait_for_end(records: Sequence[ProcessRecord], poll_seconds: float = 0.5) -> ProcessRecord:
    """Blocks until one of the processes has ended, and says which. Ends only so, or by an exception."""
    while True:
        for record in records:
            if find(record) is None:
                return record
        time.sleep(poll_seconds)


def _session_of(process: psutil.Process) -> int | None:
    try:
        return None if process.status() == psutil.STATUS_ZOMBIE else os.getsid(process.pid)
    except (psutil.NoSuchProcess, ProcessLookupError, PermissionError):
        return None


def _signal(process: psutil.Process, number: signal.Signals) -> None:
    try:
        process.send_signal(number)
    except psutil.NoSuchProcess:
        return
