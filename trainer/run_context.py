"""What every training run is given: a folder, someone to tell, and a way to be stopped."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True)
class RunProgress:
    """How far a run is.

    Attributes:
        stage: what it is doing: ``labels``, ``pairs``, ``reference``, ``training``, ``gates``, ``report``.
        step: done steps of the stage.
        num_steps: steps of the stage; 0 = not known.
        loss: of the last step, where the stage has one.
        metrics: by name, for example ``expert_share/math``.
        remaining_seconds: of the stage; None = not known yet.
        note: lines that people should read, such as a warning; "" = none. Each note is told once.
    """

    stage: str
    step: int
    num_steps: int
    loss: float | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    remaining_seconds: float | None = None
    note: str = ""


Report = Callable[[RunProgress], None]


class Stop:
    """Asks a run to end at its next step. May be set from any thread or signal handler."""

    def __init__(self) -> None:
        self._event = threading.Event()
        self.save = True

    def request(self, *, save: bool = True) -> None:
        """Ask; the run saves its state first unless told otherwise."""
        self.save = save
        self._event.set()

    @property
    def requested(self) -> bool:
        """Whether someone has asked."""
        return self._event.is_set()

    def check(self) -> None:
        """Raises Stopped if someone has asked."""
        if self.requested:
            raise Stopped


class Stopped(Exception):
    """The run has ended early because it was asked to; what it saved can be resumed."""


def silent(progress: RunProgress) -> None:
    """A report that tells nobody."""


@dataclass(frozen=True, slots=True)
class RunContext:
    """Where a run lives.

    Attributes:
        folder: its own; states, logs, metrics and results lie there. A folder with the states of an earlier
            attempt of the same run is continued.
        report: told now and then how far it is.
        stop: checked at every step.
    """

    folder: Path
    report: Report = silent
    stop: Stop = field(default_factory=Stop)


@dataclass(frozen=True, slots=True)
class RunResult:
    """What a run has made.

    Attributes:
        artifact: file or folder; a complete router checkpoint where `is_checkpoint`.
        is_checkpoint: whether the artifact is one that a router can serve.
        metrics: plain values, written into the manifest where there is one.
    """

    artifact: Path
    is_checkpoint: bool
    metrics: Mapping[str, Any]
