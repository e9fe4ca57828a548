"""The processes of a job, found by a mark in their environment, whatever has become of their parents."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import psutil

MARK = "FUSIONROUTE_JOB_FOLDER"
"""Environment variable that a job's process and all its descendants carry."""


def processes_of(folder: Path) -> list[psutil.Process]:
    """The running processes of the job in `folder`, this one left out."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if (
                process.pid != os.getpid()
                and process.environ().get(MARK) == str(folder)
                and process.status() != psutil.STATUS_ZOMBIE
            ):
                found.append(process)
    return found


def end_processes(folder: Path, *, deadline_seconds: float = 5.0) -> int:
    """Kills what runs of the job in `folder`, this process left out, and waits until it is gone.

    Returns:
        How many there were.
    """
    killed: set[psutil.Process] = set()
    # A process may have started another while we looked: look again until there is none.
    while found := [process for process in processes_of(folder) if process not in killed]:
        for process in found:
            with contextlib.suppress(psutil.Error):
                process.kill()
        killed |= set(found)
    psutil.wait_procs(list(killed), timeout=deadline_seconds)
    return len(killed)
