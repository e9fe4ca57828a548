"""A training loop in several processes: starts them, passes on what they report, ends them for certain."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from fusionroute import errors, processes
from fusionroute.errors import FusionRouteError, InternalFault, Reason, invalid
from fusionroute.processes import ProcessRecord
from trainer.config import TrainingTable
from trainer.loop_process import (
    FAILURE_FILE,
    PROCESSES_FOLDER,
    PROGRESS_FILE,
    RENDEZVOUS_VARIABLE,
    STOP_FILE,
    STOPPED_EXIT_CODE,
)
from trainer.loop_run import TRAINED_FOLDER
from trainer.run_context import RunContext, RunProgress, Stopped
from trainer.trained_router import LoopOutcome, read_outcome

POLL_SECONDS = 0.1
SAVE_SECONDS = 900.0
"""How long children may take to save a state after they were asked to stop."""
EXIT_CODE_SECONDS = 5.0
"""How long to wait for the exit code of a process that is gone."""
_LOG_TAIL_BYTES = 2000


def train_in_children(folder: Path, table: TrainingTable, context: RunContext) -> LoopOutcome:
    """Runs the processes that the table asks for; raises as `trainer.loop.train_loop`."""
    meeting = folder / PROCESSES_FOLDER
    for name in (PROGRESS_FILE, STOP_FILE, FAILURE_FILE):
        (meeting / name).unlink(missing_ok=True)
    children = _Children(_start(folder, meeting, table))
    try:
        _accompany(children, meeting, context)
    finally:
        processes.stop(children.records, 0.0)
    outcome = read_outcome(folder / TRAINED_FOLDER)
    if outcome is None:
        raise InternalFault(Reason.INTERNAL, f"all training processes ended well, but {folder} has no result")
    return outcome


@dataclass
class _Children:
    records: Sequence[ProcessRecord]
    exit_codes: dict[str, int | None] = field(default_factory=dict)
    _gone_since: dict[str, float] = field(default_factory=dict)

    def look(self) -> None:
        """Notes which have ended, and how; the code comes a little later, when the last thread has ended."""
        for record in self.records:
            if record.name in self.exit_codes or processes.find(record) is not None:
                continue
            code = processes.exit_code(record)
            gone_seconds = time.monotonic() - self._gone_since.setdefault(record.name, time.monotonic())
            if code is not None or gone_seconds > EXIT_CODE_SECONDS:
                self.exit_codes[record.name] = code

    @property
    def all_ended(self) -> bool:
        return len(self.exit_codes) == len(self.records)

    @property
    def failed(self) -> list[ProcessRecord]:
        """Those that ended otherwise than well or stopped."""
        return [
            record
            for record in self.records
            if self.exit_codes.get(record.name, 0) not in (0, STOPPED_EXIT_CODE)
        ]


def _accompany(children: _Children, meeting: Path, context: RunContext) -> None:
    """Returns when all have ended well."""
    reported = _new_lines(meeting / PROGRESS_FILE)
    stop_before: float | None = None
    while not children.all_ended:
        if context.stop.requested and stop_before is None:
            stop_before = time.monotonic() + (SAVE_SECONDS if context.stop.save else 0.0)
            if context.stop.save:
                (meeting / STOP_FILE).touch()
        if stop_before is not None and time.monotonic() >= stop_before:
            raise Stopped
        time.sleep(POLL_SECONDS)
        children.look()
        for line in next(reported):
            context.report(RunProgress(**json.loads(line)))
        if children.failed:
            break
    if children.failed:
        raise _failure(meeting, children)
    if STOPPED_EXIT_CODE in children.exit_codes.values():
        if stop_before is None:
            raise InternalFault(Reason.INTERNAL, "training processes were stopped by someone else")
        raise Stopped


def _start(folder: Path, meeting: Path, table: TrainingTable) -> list[ProcessRecord]:
    meeting.mkdir(parents=True, exist_ok=True)
    module = ["-m", "trainer.loop_process", str(folder)]
    root = str(Path(__file__).resolve().parent.parent)
    paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
    shared: dict[str, str | None] = {"PYTHONPATH": os.pathsep.join(paths)}
    if table.launcher:
        command = [_program(table.launcher[0]), *table.launcher[1:], *module]
        return [_spawn("launcher", command, meeting, shared)]
    rendezvous = meeting / "rendezvous"
    rendezvous.unlink(missing_ok=True)
    shared |= _loopback_only() | {
        RENDEZVOUS_VARIABLE: str(rendezvous),
        "WORLD_SIZE": str(table.num_processes),
        "LOCAL_WORLD_SIZE": str(table.num_processes),
    }
    if "OMP_NUM_THREADS" not in os.environ:
        shared["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // table.num_processes))
    command = [sys.executable, *module]
    return [
        _spawn(f"rank-{rank}", command, meeting, {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(table.num_processes)
    ]


def _spawn(
    name: str, command: Sequence[str], meeting: Path, environment: Mapping[str, str | None]
) -> ProcessRecord:
    return processes.spawn(
        name, command, log=meeting / f"{name}.txt", environment=environment, die_with_parent=True
    )


def _program(name: str) -> str:
    beside = Path(sys.executable).with_name(name)
    path = str(beside) if beside.is_file() else shutil.which(name)
    if path is None:
        raise invalid("training.launcher", name, "a program that can be found")
    return path


def _loopback_only() -> dict[str, str | None]:
    """The processes are on one machine: gradients travel over loopback unless someone has said otherwise."""
    loopback = next(
        (
            name
            for name, addresses in psutil.net_if_addrs().items()
            if any(address.address == "127.0.0.1" for address in addresses)
        ),
        None,
    )
    variables = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
    return {name: loopback for name in variables if loopback is not None and name not in os.environ}


def _new_lines(path: Path) -> Iterator[list[str]]:
    """At each `next` the whole lines that were appended since the last."""
    position = 0
    while True:
        lines: list[str] = []
        if path.exists():
            with path.open("rb") as file:
                file.seek(position)
                for line in file:
                    if not line.endswith(b"\n"):
                        break
                    position += len(line)
                    lines.append(line.decode())
        yield lines


def _failure(meeting: Path, children: _Children) -> FusionRouteError:
    """What a child said, or the end of the log of one that said nothing."""
    try:
        content = json.loads((meeting / FAILURE_FILE).read_text(encoding="utf-8"))
        kind: type[FusionRouteError] = getattr(errors, content["class"])
        return kind(Reason[content["reason"]], content["message"], metadata=content["metadata"])
    except FileNotFoundError:
        pass
    record = children.failed[0]
    code = children.exit_codes[record.name]
    how = (
        f"was killed by {signal.Signals(-code).name}"
        if code is not None and code < 0
        else f"ended with code {code}"
    )
    tail = record.log.read_bytes()[-_LOG_TAIL_BYTES:].decode(errors="replace").strip()
    return InternalFault(
        Reason.INTERNAL, f"training process {record.name} {how}; the end of {record.log}:\n{tail}"
    )
