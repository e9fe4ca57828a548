"""A training run in this very process: its folder, its signals, its log, and what it says at the end.

RUN_FOLDER/
    run.json       what is to be done; another configuration is refused
    result.json    what came out; the same command again says it once more
    log.txt        what the run logs
    lock           held while a process works here
besides what the run itself puts there: states, metrics.jsonl, report.png ...
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import click

from fusionroute.cli.group import EXIT_INTERRUPTED, Failure

if TYPE_CHECKING:
    from trainer.config import JobConfig
    from trainer.run_context import RunContext, RunResult, Stop

    Runner = Callable[[JobConfig, RunContext], RunResult]

RUN_FILE, RESULT_FILE, LOG_FILE, LOCK_FILE = "run.json", "result.json", "log.txt", "lock"
REPORT_FILE = "report.png"


@dataclass(frozen=True, slots=True)
class LocalResult:
    """What a run has made.

    Attributes:
        artifact: checkpoint, labels or pairs, where they lie for good.
        folder: of the run.
        report: the picture; None where none was drawn.
        metrics: plain values.
    """

    artifact: Path
    is_checkpoint: bool
    folder: Path
    report: Path | None
    metrics: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        """Plain values, as `result.json` and `--json` have them."""
        return {
            "artifact": str(self.artifact),
            "is_checkpoint": self.is_checkpoint,
            "folder": str(self.folder),
            "report": None if self.report is None else str(self.report),
            "metrics": self.metrics,
        }


def run_here(
    config: JobConfig, folder: Path, output: Path | None = None, runner: Runner | None = None
) -> LocalResult:
    """Runs a job in this process, showing how far it is; what an earlier run left in the folder is continued.

    The first Ctrl-C lets the run save and stop, a second one kills it.

    Args:
        output: where a finished checkpoint is moved; must not exist.
        runner: what does the work; None = `trainer.run.run`.

    Raises:
        Failure: the folder belongs to another configuration or process, or `output` exists.
        FusionRouteError: as the run means it.
        click.exceptions.Exit: stopped by a signal.
    """
    from fusionroute.cli.train_progress import shown_progress
    from trainer.run_context import RunContext, Stop, Stopped

    folder.mkdir(parents=True, exist_ok=True)
    folder = folder.resolve()
    output = None if output is None else output.resolve()
    with _held(folder):
        _check_same(config, folder)
        earlier = _earlier_result(folder)
        if output is not None and output.exists() and (earlier is None or earlier.artifact != output):
            raise Failure(f"--output {output} exists already")
        if earlier is not None:
            return _moved(earlier, output)
        stop = Stop()
        with _signals(stop), _log_in(folder / LOG_FILE), shown_progress() as show:
            try:
                result = (runner or _trainer())(config, RunContext(folder, show, stop))
            except Stopped:
                click.echo(f"stopped; the same command goes on from what lies in {folder}", err=True)
                raise click.exceptions.Exit(EXIT_INTERRUPTED) from None
        report = folder / REPORT_FILE
        made = LocalResult(
            result.artifact.resolve(),
            result.is_checkpoint,
            folder,
            report if report.exists() else None,
            dict(result.metrics),
        )
        _replace(folder / RESULT_FILE, json.dumps(made.to_json(), indent=2, default=float))
        return _moved(made, output)


def _trainer() -> Runner:
    from trainer.run import run

    return run


def _moved(result: LocalResult, output: Path | None) -> LocalResult:
    if output is None or not result.is_checkpoint or result.artifact == output:
        return result
    move_folder(result.artifact, output)
    moved = LocalResult(output, True, result.folder, result.report, result.metrics)
    _replace(result.folder / RESULT_FILE, json.dumps(moved.to_json(), indent=2, default=float))
    return moved


def move_folder(source: Path, target: Path) -> None:
    """Moves a folder in one step; to another file system by a copy that gets its name once it is whole."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        source.rename(target)
        return
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
    draft = target.with_name(f".{target.name}.draft")
    shutil.rmtree(draft, ignore_errors=True)
    shutil.copytree(source, draft)
    draft.rename(target)
    shutil.rmtree(source)


def _check_same(config: JobConfig, folder: Path) -> None:
    """Notes what is to be done in the folder, or refuses when something else was begun there."""
    wanted = {"kind": config.kind.value, "config": json.loads(config.to_json())}
    path = folder / RUN_FILE
    if not path.exists():
        _replace(path, json.dumps(wanted, indent=2))
        return
    try:
        begun = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise Failure(f"{path} cannot be read: {error}") from None
    differing = [f"{name}: {old!r} there, {new!r} now" for name, old, new in _differences(begun, wanted, "")]
    if differing:
        raise Failure(
            f"another run was begun in {folder}; name another one with --run-folder, or remove it",
            details="\n".join(f"  {line}" for line in differing),
        )


def _differences(old: Any, new: Any, name: str) -> Iterator[tuple[str, Any, Any]]:
    if isinstance(old, dict) and isinstance(new, dict):
        for key in dict.fromkeys([*old, *new]):
            yield from _differences(old.get(key), new.get(key), f"{name}.{key}" if name else key)
    elif old != new:
        yield name.removeprefix("config."), old, new


def _earlier_result(folder: Path) -> LocalResult | None:
    """What an earlier run came to, if what it made is still there."""
    try:
        content = json.loads((folder / RESULT_FILE).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None
    artifact, report = Path(content["artifact"]), content["report"]
    if not artifact.exists():
        return None
    click.echo(f"done before; remove {folder} to do it again", err=True)
    return LocalResult(
        artifact,
        content["is_checkpoint"],
        folder,
        None if report is None else Path(report),
        content["metrics"],
    )


def _replace(path: Path, text: str) -> None:
    draft = path.with_name(f".{path.name}.draft")
    draft.write_text(text + "\n", encoding="utf-8")
    draft.replace(path)


@contextmanager
def _held(folder: Path) -> Iterator[None]:
    with (folder / LOCK_FILE).open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Failure(f"another process works in {folder}") from None
        yield


@contextmanager
def _signals(stop: Stop) -> Iterator[None]:
    """Ctrl-C, SIGTERM and SIGHUP ask the run to save and stop; a second one of them ends the process at once."""

    def handle(number: int, frame: FrameType | None) -> None:
        if stop.requested:
            sys.stderr.write("\x1b[?25h" if sys.stderr.isatty() else "")  # the cursor that bars hide
            os._exit(EXIT_INTERRUPTED)
        stop.request(save=True)
        click.echo("stopping once the state is saved; again to stop at once", err=True)

    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.signal(number, handle) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _log_in(path: Path) -> Iterator[None]:
    """Events of the run go into its log, where they do not tear the bars apart."""
    import logging

    import structlog

    before = structlog.get_config()
    root = logging.getLogger()
    with path.open("a", encoding="utf-8") as log:
        structlog.configure(
            processors=[
                structlog.stdlib.add_log_level,
                structlog.processors.TimeStamper(fmt="iso", utc=True),
                structlog.dev.ConsoleRenderer(
                    colors=False, exception_formatter=structlog.dev.plain_traceback
                ),
            ],
            logger_factory=structlog.PrintLoggerFactory(log),
            cache_logger_on_first_use=False,
        )
        handler = logging.StreamHandler(log)
        handler.setLevel(logging.WARNING)
        root.addHandler(handler)
        try:
            yield
        finally:
            root.removeHandler(handler)
            structlog.configure(**before)
