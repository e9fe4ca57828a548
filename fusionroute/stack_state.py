"""What a local stack remembers about itself on disk, so that another command can find, show and stop it.

<state root>/<name>/state.json    what runs: pids, addresses, logs; present while the stack is up
                    lock          held by whoever starts or stops the stack
                    logs/*.log    what the daemons say
                    ready/*       where each daemon serves, written by itself
                    prometheus.json   the watch ports, as Prometheus's file_sd_configs reads them
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

from fusionroute import processes
from fusionroute.processes import ProcessRecord


class StackError(Exception):
    """The stack cannot do what was asked; the message says why, for people."""


class AlreadyUp(StackError):
    """A stack of that name is running."""


class NotUp(StackError):
    """No stack of that name is running."""


class ProcessDied(StackError):
    """A process of the stack ended while it was needed.

    Attributes:
        log_tail: the last lines it wrote.
    """

    def __init__(self, record: ProcessRecord, exit_code: int | None) -> None:
        code = "" if exit_code is None else f" with exit code {exit_code}"
        super().__init__(f"{record.name} ended{code} before the stack was ready; its log is {record.log}")
        self.log_tail = tail(record.log, 25)


@dataclass(frozen=True, slots=True)
class StackState:
    """What runs, as state.json holds it."""

    name: str
    started_at_seconds: float
    # HOST:PORT, of several routers with commas between them
    router_address: str
    processes: tuple[ProcessRecord, ...]
    # where each process serves, by process name
    addresses: Mapping[str, str] = field(default_factory=dict)
    # HOST:PORT of the watch ports, by process name; empty without them
    watch_addresses: Mapping[str, str] = field(default_factory=dict)
    # URLs of the routers' HTTP ports, by process name; empty without them
    http_urls: Mapping[str, str] = field(default_factory=dict)
    # names of processes that are being stopped while the others go on
    leaving: tuple[str, ...] = ()

    @property
    def alive(self) -> list[ProcessRecord]:
        """The processes that still run."""
        return [record for record in self.processes if processes.find(record) is not None]

    def to_json(self) -> str:
        """This state as JSON text."""
        return json.dumps({"format": 1, **asdict(self)}, indent=2, default=str)

    def save(self, folder: Path) -> None:
        """Writes state.json in one move, so that a reader sees the old or the new one."""
        draft = folder / "state.json.draft"
        draft.write_text(self.to_json())
        draft.replace(folder / "state.json")

    @classmethod
    def from_json(cls, text: str) -> StackState:
        """The inverse of `to_json`.

        Raises:
            ValueError: the text is not such a state.
        """
        try:
            fields = json.loads(text)
            if fields.pop("format") != 1:
                raise ValueError("unknown format")
            records = tuple(
                ProcessRecord(**{**record, "log": Path(record["log"]), "command": tuple(record["command"])})
                for record in fields.pop("processes")
            )
            leaving = tuple(fields.pop("leaving", ()))
            return cls(processes=records, leaving=leaving, **fields)
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"not a stack state: {error}") from error


def state_root() -> Path:
    """Where stacks keep their state: $FUSIONROUTE_STATE_DIR, else the user's state directory."""
    if explicit := os.environ.get("FUSIONROUTE_STATE_DIR"):
        return Path(explicit).expanduser()
    base = os.environ.get("XDG_STATE_HOME") or "~/.local/state"
    return Path(base).expanduser() / "fusionroute"


def stack_folder(name: str, root: Path | None = None) -> Path:
    """The state folder of a stack.

    Raises:
        StackError: the name cannot be a folder name.
    """
    if not name or not all(c.isalnum() or c in "_-" for c in name):
        raise StackError(f"stack name {name!r}: use letters, digits, - and _ only")
    return (root or state_root()) / name


def load_state(folder: Path) -> StackState | None:
    """The state in a folder; None when nothing was started there.

    Raises:
        StackError: there is a state file that cannot be read.
    """
    path = folder / "state.json"
    try:
        return StackState.from_json(path.read_text())
    except FileNotFoundError:
        return None
    except (ValueError, OSError) as error:
        raise StackError(f"{path} cannot be read ({error}); remove it once nothing of it runs") from error


def forget_state(folder: Path) -> None:
    """Removes state.json; logs stay."""
    (folder / "state.json").unlink(missing_ok=True)


def tail(path: Path, num_lines: int) -> list[str]:
    """The last lines of a log; none when there is no log."""
    try:
        text = path.read_text(errors="replace")
    except FileNotFoundError:
        return []
    return text.splitlines()[-num_lines:] if num_lines > 0 else []


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keeps every other start and stop of this stack out.

    Raises:
        StackError: one of them is at work.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise StackError(
                f"the stack {folder.name!r} is being started or stopped by someone else"
            ) from None
        yield
