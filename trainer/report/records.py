"""What a run has written down about itself, read for the report.

folder/
    metrics.jsonl      one object for each logged step: "step" and numbers by name
    bias.json          BiasStatistics.to_json(), of a run with pairs
    ownership.json     Ownership.to_json(), where it was measured
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from fusionroute.errors import Reason, TrainingFailed

METRICS_FILE = "metrics.jsonl"
BIAS_FILE = "bias.json"
OWNERSHIP_FILE = "ownership.json"
SHARE_PREFIX = "expert_share/"


@dataclass(frozen=True, slots=True)
class Series:
    """One metric over the run; both lists have one length."""

    steps: list[float]
    values: list[float]

    def __bool__(self) -> bool:
        return bool(self.steps)


@dataclass(frozen=True)
class RunRecords:
    """All that is known of a run.

    Attributes:
        metrics: by name, each over the steps at which it was logged and finite.
        bias: of the pairs before training; None without.
        ownership: who was right; None where it was not measured.
    """

    metrics: dict[str, Series]
    bias: dict[str, Any] | None = None
    ownership: dict[str, Any] | None = None
    _slots: tuple[str, ...] = field(default=())

    @classmethod
    def read(cls, folder: Path) -> RunRecords:
        """What lies in the folder of a run; files that are absent are left out.

        Raises:
            TrainingFailed: STATE_BROKEN, naming file and line that cannot be read.
        """
        return cls(
            metrics=_by_name(_read_lines(folder / METRICS_FILE)),
            bias=_read_object(folder / BIAS_FILE),
            ownership=_read_object(folder / OWNERSHIP_FILE),
        )

    def series(self, name: str) -> Series:
        """A metric over the run; empty when it was never logged."""
        return self.metrics.get(name, Series([], []))

    def has(self, *names: str) -> bool:
        """Whether any of these metrics was logged."""
        return any(self.series(name) for name in names)

    @cached_property
    def slots(self) -> list[str]:
        """The experts' slots in the order of the checkpoint."""
        owned = list(self.ownership["slots"]) if self.ownership else []
        shares = [name.removeprefix(SHARE_PREFIX) for name in self.metrics if name.startswith(SHARE_PREFIX)]
        return list(dict.fromkeys([*owned, *shares]))

    @property
    def num_steps(self) -> int:
        """The last logged step."""
        return int(max((series.steps[-1] for series in self.metrics.values()), default=0))


def _by_name(lines: Iterator[dict[str, Any]]) -> dict[str, Series]:
    found: dict[str, Series] = {}
    for line in lines:
        for name, value in line.items():
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            if name == "step" or not is_number or not math.isfinite(value):
                continue
            series = found.setdefault(name, Series([], []))
            series.steps.append(float(line["step"]))
            series.values.append(float(value))
    return found


def _read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Whole lines; a last one that is torn, because the run was killed, is left out."""
    if not path.exists():
        return
    lines = path.read_text(encoding="utf-8").split("\n")
    for number, text in enumerate(lines[:-1], start=1):
        line = _parsed(text, f"{path}, line {number}")
        if not isinstance(line.get("step"), int):
            raise TrainingFailed(Reason.STATE_BROKEN, f"{path}, line {number}: step is missing")
        yield line


def _read_object(path: Path) -> dict[str, Any] | None:
    return _parsed(path.read_text(encoding="utf-8"), str(path)) if path.exists() else None


def _parsed(text: str, origin: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise TrainingFailed(Reason.STATE_BROKEN, f"{origin} cannot be read: {error}") from None
    if not isinstance(value, dict):
        raise TrainingFailed(Reason.STATE_BROKEN, f"{origin} is not an object")
    return value
