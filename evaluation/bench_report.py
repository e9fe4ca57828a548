"""What a benchmark has found, in one form for all suites: printed, written as JSON, drawn.

A finding is one number that answers one question, with the aim it is held against. Tables hold what the findings come
from, panels what is worth a look, `runs` every single run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, asdict, dataclass, field
from typing import Any, TypeAlias

from evaluation.bench_runs import Runs, Spread

Cell: TypeAlias = str | int | float | None


@dataclass(frozen=True, slots=True)
class Finding:
    """One answer.

    Attributes:
        what: the question, as "A / B" where it is a ratio.
        value: median over the runs, with least and largest.
        at_most, at_least: what is aimed at; None where nothing is.
        unit: of the value; "" = a ratio.
    """

    what: str
    value: Spread
    _: KW_ONLY
    at_most: float | None = None
    at_least: float | None = None
    unit: str = ""

    @property
    def aim(self) -> str:
        """In words; empty when there is none."""
        if self.at_most is not None:
            return f"at most {self.at_most:g}"
        return "" if self.at_least is None else f"at least {self.at_least:g}"

    @property
    def is_met(self) -> bool | None:
        """Whether the median meets the aim; None without one."""
        if self.at_most is not None:
            return self.value.median <= self.at_most
        return None if self.at_least is None else self.value.median >= self.at_least


@dataclass(frozen=True, slots=True)
class Table:
    """Rows of cells under headings; the first column names the row."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]


@dataclass(frozen=True, slots=True)
class Bars:
    """A bar for each name, with a whisker from least to largest."""

    title: str
    unit: str
    values: Mapping[str, Spread]
    reference: float | None = None


@dataclass(frozen=True, slots=True)
class Stacks:
    """A bar for each name, made of parts."""

    title: str
    unit: str
    bars: Mapping[str, Mapping[str, float]]


@dataclass(frozen=True, slots=True)
class Lines:
    """A line for each name through points (x, y)."""

    title: str
    x_label: str
    y_label: str
    lines: Mapping[str, Sequence[tuple[float, float]]]
    has_log_x: bool = False


Panel: TypeAlias = Bars | Stacks | Lines


@dataclass(frozen=True, slots=True)
class Report:
    """The result of one suite.

    Attributes:
        suite: as on the command line.
        question: what it answers, in a sentence.
        configuration: everything without which the numbers mean nothing.
        notes: how to read them.
    """

    suite: str
    question: str
    configuration: Mapping[str, Any]
    findings: Sequence[Finding]
    tables: Sequence[Table]
    panels: Sequence[Panel] = ()
    notes: Sequence[str] = ()
    runs: Mapping[str, Mapping[str, Runs]] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """The same for programs; panels are drawn from what else is in it and left out."""
        return {
            "suite": self.suite,
            "question": self.question,
            "configuration": dict(self.configuration),
            "findings": [
                {
                    "what": each.what,
                    **asdict(each.value),
                    "unit": each.unit,
                    "aim": each.aim,
                    "is_met": each.is_met,
                }
                for each in self.findings
            ],
            "tables": [
                {
                    "title": each.title,
                    "columns": list(each.columns),
                    "rows": [list(row) for row in each.rows],
                }
                for each in self.tables
            ],
            "notes": list(self.notes),
            "runs": {
                group: {name: runs.to_json() for name, runs in of_group.items()}
                for group, of_group in self.runs.items()
            },
        }


def speed_table(title: str, runs: Mapping[str, Runs]) -> Table:
    """Milliseconds per token by the wall and of processors, for each way."""
    rows: list[list[Cell]] = []
    for name, each in runs.items():
        wall, cpu = Spread.of(each.ms_per_token), Spread.of(each.cpu_ms_per_token)
        rows.append(
            [name, wall.median, wall.low, wall.high, cpu.median, Spread.of(each.tokens_per_second).median]
        )
    return Table(title, ("way", "ms / token", "least", "most", "CPU ms / token", "tokens / s"), rows)
