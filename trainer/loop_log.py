"""Where a run's metrics go: lines of JSON, TensorBoard, and whoever listens to its progress."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.run_context import Report, RunProgress

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

METRICS_FILE = "metrics.jsonl"
TENSORBOARD_FOLDER = "tensorboard"
REPORT_SECONDS = 1.0


class LoopLog:
    """Metrics of a run of `num_steps`, from `first_step` on; what is later from an attempt that was cut off goes.

    Args:
        folder: of the run.
        report: told about progress.
        num_steps: of the whole run.
        first_step: steps that earlier attempts have taken.
        tensorboard: whether to write that too.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        folder: Path,
        report: Report,
        num_steps: int,
        first_step: int,
        *,
        tensorboard: bool,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._path = folder / METRICS_FILE
        self._report, self._num_steps, self._first_step = report, num_steps, first_step
        self._clock = clock
        self._began = self._window_began = self._told = clock()
        truncate_metrics(self._path, first_step)
        self._board = _board(folder / TENSORBOARD_FOLDER, first_step) if tensorboard else None
        self.last: dict[str, float] = {}

    def write(self, step: int, metrics: Mapping[str, float], num_tokens: float) -> None:
        """Metrics of the steps since the last call, the last of which is `step`."""
        now = self._clock()
        speed = num_tokens / max(now - self._window_began, 1e-9)
        self._window_began = now
        self.last = {**metrics, "tokens_per_second": speed}
        with self._path.open("a", encoding="utf-8") as lines:
            lines.write(json.dumps({"step": step, **self.last}) + "\n")
        if self._board is not None:
            for name, value in self.last.items():
                self._board.add_scalar(name, value, step)
        self._tell(step, now)

    def advance(self, step: int) -> None:
        """A step is done; tells so about once a second."""
        now = self._clock()
        if now - self._told >= REPORT_SECONDS:
            self._tell(step, now)

    def close(self) -> None:
        """Writes what is still on its way."""
        if self._board is not None:
            self._board.close()

    def _tell(self, step: int, now: float) -> None:
        self._told = now
        remaining = (now - self._began) / max(1, step - self._first_step) * (self._num_steps - step)
        loss = self.last.get("loss")
        self._report(RunProgress("training", step, self._num_steps, loss, dict(self.last), remaining))


def truncate_metrics(path: Path, last_step: int) -> None:
    """Cuts off a half-written line and all lines after a step: the run goes on from there."""
    if not path.exists():
        return
    with path.open("rb+") as lines:
        end = 0
        for line in lines:
            if not line.endswith(b"\n") or json.loads(line)["step"] > last_step:
                break
            end += len(line)
        lines.truncate(end)
        os.fsync(lines.fileno())


def _board(folder: Path, first_step: int) -> SummaryWriter:
    from torch.utils.tensorboard import SummaryWriter

    purge: Any = first_step + 1 if first_step else None
    return SummaryWriter(str(folder), purge_step=purge)
