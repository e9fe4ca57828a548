"""`python -m trainer.jobs.process FOLDER`: one job, in a process of its own.

It reads what to do from its folder and writes there how far it is and how it ended. Standard input carries the
words `save` and `discard`, each of which asks it to stop; its end means that the supervisor is gone.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from enum import IntEnum
from pathlib import Path
from types import FrameType
from typing import TypeAlias

import structlog

from fusionroute.errors import FusionRouteError, Reason, TrainingFailed
from fusionroute.manifest import COMPLETE_FILE
from fusionroute.telemetry import configure_logs, quiet_native_logs
from trainer.config import JOBS, JobConfig
from trainer.jobs.folder import Broken, Done, FolderBusy, JobFolder, Outcome, StoppedEarly, reason_of
from trainer.jobs.leftovers import end_processes
from trainer.run_context import RunContext, RunProgress, RunResult, Stop, Stopped

REPORT_SECONDS = 0.2
LOCK_PATIENCE_SECONDS = 10.0

Runner: TypeAlias = Callable[[JobConfig, RunContext], RunResult]

log = structlog.get_logger(__name__)


class ProcessExit(IntEnum):
    """What the exit code of a job's process says; any other: it died."""

    OUTCOME_WRITTEN = 0
    STORAGE_FULL = 28
    """The run may have ended in any way, but there was no room left to say so."""
    FOLDER_BUSY = 75


def main(arguments: Sequence[str], run: Runner | None = None) -> int:
    """Does the job in the folder `arguments[0]`.

    Args:
        arguments: of the command line, the program's name left out.
        run: what does the work; None = `trainer.run.run`.
    """
    quiet_native_logs()
    configure_logs("trainer-job", log_format="console")
    folder = JobFolder(Path(arguments[0]))
    assignment = folder.read_assignment()
    stop = Stop()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _asking(stop))
    left_alone = _listen(folder, stop, assignment.stop_seconds)
    try:
        with folder.held(LOCK_PATIENCE_SECONDS), _Reporter(folder) as reporter:
            context = RunContext(folder=folder.path, report=reporter.report, stop=stop)
            outcome = _outcome_of(lambda: JOBS[assignment.kind].from_json(assignment.config), context, run)
            folder.write_outcome(outcome)
    except FolderBusy as error:
        log.error("folder_busy", message=str(error))
        return ProcessExit.FOLDER_BUSY
    except OSError as error:
        log.exception("outcome_not_written")
        if reason_of(error) is Reason.STORAGE_FULL:
            return ProcessExit.STORAGE_FULL
        raise
    finally:
        if left_alone.is_set():  # else the supervisor sees to it
            end_processes(folder.path)
    return ProcessExit.OUTCOME_WRITTEN


def _outcome_of(read: Callable[[], JobConfig], context: RunContext, run: Runner | None) -> Outcome:
    """Runs to the end; whatever may be raised becomes an outcome, its traceback a part of the log."""
    try:
        config = read()
        log.info("run_begins", kind=config.kind.value, name=config.name, pid=os.getpid())
        result = (run or _installed_runner())(config, context)
        _check(result)
    except Stopped:
        log.info("run_stopped", saved=context.stop.save)
        return StoppedEarly()
    except FusionRouteError as error:
        log.exception("run_failed", reason=error.reason.value)
        return Broken(error.reason, error.message)
    except OSError as error:
        log.exception("run_failed")
        return Broken(reason_of(error), _words(error))
    except Exception as error:
        log.exception("run_failed")
        return Broken(Reason.INTERNAL, _words(error))
    log.info("run_done", artifact=str(result.artifact), is_checkpoint=result.is_checkpoint)
    return Done(result.artifact, result.is_checkpoint)


def _check(result: RunResult) -> None:
    if result.is_checkpoint and not (result.artifact / COMPLETE_FILE).is_file():
        message = f"{result.artifact} is not a complete checkpoint: {COMPLETE_FILE} is missing"
        raise TrainingFailed(Reason.CHECKPOINT_INCOMPLETE, message)


def _words(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def _installed_runner() -> Runner:
    from trainer.run import run

    runner: Runner = run
    return runner


def _asking(stop: Stop) -> Callable[[int, FrameType | None], None]:
    def handle(number: int, frame: FrameType | None) -> None:
        stop.request(save=True)

    return handle


def _listen(folder: JobFolder, stop: Stop, stop_seconds: float) -> threading.Event:
    """Obeys the supervisor's words, and ends this process and its children in time when it is gone.

    Returns:
        Set once there is no supervisor any more.
    """
    left_alone = threading.Event()
    words = os.dup(0)  # not inherited by children, who must not eat our words
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)

    def listen() -> None:
        while piece := os.read(words, 64):
            stop.request(save=b"discard" not in piece)
        left_alone.set()
        stop.request(save=stop.save)
        time.sleep(stop_seconds)
        end_processes(folder.path)
        os._exit(1)

    threading.Thread(target=listen, name="supervisor-words", daemon=True).start()
    return left_alone


class _Reporter:
    """Writes progress down, seldom enough to cost nothing; the newest is written at the latest at the end."""

    def __init__(self, folder: JobFolder) -> None:
        self._folder = folder
        self._latest: RunProgress | None = None
        self._note = ""
        self._written: RunProgress | None = None
        self._written_at = -REPORT_SECONDS

    def report(self, progress: RunProgress) -> None:
        """Called by the run, as often as it likes."""
        if progress.note:
            self._note = progress.note
            print(progress.note, file=sys.stderr, flush=True)
        # whoever looks only now and then should find the note all the same
        self._latest = replace(progress, note=self._note)
        is_new_stage = self._written is None or self._written.stage != progress.stage
        if is_new_stage or time.monotonic() - self._written_at >= REPORT_SECONDS:
            self._write()

    def __enter__(self) -> _Reporter:
        return self

    def __exit__(self, *error: object) -> None:
        if self._latest is not self._written:
            self._write()

    def _write(self) -> None:
        assert self._latest is not None
        with contextlib.suppress(OSError):  # a full disk ends the run where it matters
            self._folder.write_progress(self._latest)
        self._written, self._written_at = self._latest, time.monotonic()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
