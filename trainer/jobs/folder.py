"""What lies in a job's folder besides what the run itself puts there.

job.json        what is to be done; written by the supervisor
progress.json   how far it is; replaced by the job's process now and then
outcome.json    how the run ended; the last thing that the job's process writes
log.txt         what all attempts have printed
lock            held by the process that works here
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from fusionroute.errors import Reason
from trainer.config import JobKind
from trainer.jobs.records import progress_from_json, progress_to_json
from trainer.run_context import RunProgress

LOG_FILE = "log.txt"


@dataclass(frozen=True, slots=True)
class Assignment:
    """What a job's process is told."""

    kind: JobKind
    config: str
    """JSON."""
    stop_seconds: float
    """How long it may take to save once it is asked to stop, or is left alone."""


@dataclass(frozen=True, slots=True)
class Done:
    """The run has made what it should."""

    artifact: Path
    is_checkpoint: bool


@dataclass(frozen=True, slots=True)
class StoppedEarly:
    """The run was asked to stop and did."""


@dataclass(frozen=True, slots=True)
class Broken:
    """The run cannot begin or go on; trying again without a change is of no use."""

    reason: Reason
    message: str


Outcome: TypeAlias = Done | StoppedEarly | Broken


def reason_of(error: OSError) -> Reason:
    """STORAGE_FULL where that is so, else INTERNAL."""
    return Reason.STORAGE_FULL if error.errno in (errno.ENOSPC, errno.EDQUOT) else Reason.INTERNAL


class FolderBusy(Exception):
    """Another process works in the folder."""


class JobFolder:
    """The folder of one job."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def log(self) -> Path:
        """What all attempts have printed."""
        return self.path / LOG_FILE

    def write_assignment(self, assignment: Assignment) -> None:
        """Makes the folder and says what is to be done in it."""
        self.path.mkdir(parents=True, exist_ok=True)
        content = {
            "kind": assignment.kind.value,
            "config": json.loads(assignment.config),
            "stop_seconds": assignment.stop_seconds,
        }
        _replace(self.path / "job.json", json.dumps(content, indent=2))

    def read_assignment(self) -> Assignment:
        """What `write_assignment` wrote. Raises OSError, ValueError or KeyError."""
        content = json.loads((self.path / "job.json").read_text(encoding="utf-8"))
        return Assignment(
            JobKind(content["kind"]), json.dumps(content["config"]), float(content["stop_seconds"])
        )

    def write_progress(self, progress: RunProgress) -> None:
        """Replaces what is known of the progress. Raises OSError."""
        _replace(self.path / "progress.json", progress_to_json(progress), is_durable=False)

    def read_progress(self) -> RunProgress | None:
        """The progress last written, None when there is none that can be read."""
        with contextlib.suppress(OSError, ValueError, TypeError):
            return progress_from_json((self.path / "progress.json").read_text(encoding="utf-8"))
        return None

    def write_outcome(self, outcome: Outcome) -> None:
        """Says how the run ended; on disk when this returns. Raises OSError."""
        _replace(self.path / "outcome.json", json.dumps(self._outcome_fields(outcome)))

    def read_outcome(self) -> Outcome | None:
        """How the run ended, None when it has not, or not in good order."""
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            content = json.loads((self.path / "outcome.json").read_text(encoding="utf-8"))
            match content["outcome"]:
                case "done":
                    return Done(self.path / content["artifact"], bool(content["is_checkpoint"]))
                case "stopped":
                    return StoppedEarly()
                case "broken":
                    return Broken(Reason[content["reason"]], str(content["message"]))
        return None

    def forget_outcome(self) -> None:
        """Before another attempt."""
        (self.path / "outcome.json").unlink(missing_ok=True)

    def _outcome_fields(self, outcome: Outcome) -> dict[str, Any]:
        match outcome:
            case Done(artifact, is_checkpoint):
                # Inside the folder it is named from there, so that the folder may be mounted elsewhere.
                inside = artifact.is_relative_to(self.path)
                named = artifact.relative_to(self.path) if inside else artifact.absolute()
                return {"outcome": "done", "artifact": str(named), "is_checkpoint": is_checkpoint}
            case StoppedEarly():
                return {"outcome": "stopped"}
            case Broken(reason, message):
                return {"outcome": "broken", "reason": reason.value, "message": message}

    @contextlib.contextmanager
    def held(self, patience_seconds: float) -> Iterator[None]:
        """Nobody else works here within the block, on any machine whose file system knows locks.

        Raises:
            FolderBusy: another process did, for as long as we had patience.
        """
        deadline = time.monotonic() + patience_seconds
        with (self.path / "lock").open("w") as lock:
            while True:
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() >= deadline:
                        raise FolderBusy(f"{self.path} is held by another process") from None
                time.sleep(0.1)
            yield


def _replace(path: Path, text: str, *, is_durable: bool = True) -> None:
    """Puts a file in place at once, so that a reader sees the old or the new one."""
    draft = path.with_name(f".{path.name}.draft")
    with draft.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        if is_durable:
            os.fsync(file.fileno())
    draft.replace(path)
