"""From outcomes to the table that people read: covered and gap tasks apart, every share with its interval."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from evaluation.questions import Outcome
from evaluation.statistics.cells import cells
from evaluation.statistics.comparing import compare as compare_pairs
from evaluation.statistics.intervals import Estimate
from evaluation.systems.ways import Way

if TYPE_CHECKING:
    from rich.table import Table

COVERED, GAP = STRATA = ("coverage=covered", "coverage=gap")


@dataclass(frozen=True, slots=True)
class Score:
    """How a system did.

    Attributes:
        system: whom.
        covered: share of right answers on tasks that experts cover.
        gap: share on tasks that no expert covers.
    """

    system: Way
    covered: Estimate
    gap: Estimate


@dataclass(frozen=True, slots=True)
class Comparison:
    """Paired difference of two systems: first minus second."""

    first: Way
    second: Way
    covered: Estimate
    gap: Estimate


def scores(outcomes: Sequence[Outcome], systems: Sequence[Way]) -> list[Score]:
    """One score for each system.

    Raises:
        ValueError: a system has no covered or no gap questions.
    """
    found = cells(outcomes, [system.name for system in systems], STRATA)
    estimates = {(cell.system, cell.stratum): cell.estimate for cell in found}
    return [Score(system, estimates[system.name, COVERED], estimates[system.name, GAP]) for system in systems]


def compare(outcomes: Sequence[Outcome], first: Way, second: Way) -> Comparison:
    """The paired difference of two systems.

    Raises:
        ValueError: one of them has answered a question that the other has not.
    """
    covered, gap = compare_pairs(outcomes, [(first.name, second.name)], STRATA)
    return Comparison(first, second, covered.difference, gap.difference)


def score_table(rows: Iterable[Score], num_covered: int, num_gap: int) -> Table:
    """The table for a terminal."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    table.add_column("exact match, 95 % interval")
    table.add_column(f"covered (n={num_covered})", justify="right")
    table.add_column(f"gap (n={num_gap})", justify="right")
    for row in rows:
        table.add_row(row.system.label, shown(row.covered), shown(row.gap))
    return table


def shown(estimate: Estimate, *, signed: bool = False) -> str:
    """An estimate in the form "0.953 [0.941, 0.964]"."""
    sign = "+" if signed else ""
    return f"{estimate.value:{sign}.3f} [{estimate.low:{sign}.3f}, {estimate.high:{sign}.3f}]"


def sentence(comparison: Comparison) -> str:
    """What a comparison says in words, with no more certainty than its intervals have."""
    parts = [
        f"{_verb(comparison.covered)} on covered tasks ({shown(comparison.covered, signed=True)})",
        f"{_verb(comparison.gap)} on gap tasks ({shown(comparison.gap, signed=True)})",
    ]
    return f"{comparison.first.label} against {comparison.second.label}: {' and '.join(parts)}."


def price_sentence(against_routing_only: Comparison) -> str:
    """What the complement costs where the experts are right without it, in words."""
    covered = against_routing_only.covered
    if not covered.excludes_zero:
        difference = shown(covered, signed=True)
        return f"Whether the complement costs anything on covered tasks these questions do not tell ({difference})."
    if covered.value > 0:
        return f"The complement costs nothing on covered tasks; it gains ({shown(covered, signed=True)})."
    return (
        f"The price of the complement: {shown(covered, signed=True)} on covered tasks, where the chosen expert "
        "alone is right more often than its sum with the router."
    )


def to_json(rows: Iterable[Score], comparisons: Iterable[Comparison]) -> dict[str, Any]:
    """The same for programs."""
    return {
        "scores": [
            {"system": row.system.name, "covered": asdict(row.covered), "gap": asdict(row.gap)}
            for row in rows
        ],
        "differences": [
            {
                "first": each.first.name,
                "second": each.second.name,
                "covered": asdict(each.covered),
                "gap": asdict(each.gap),
            }
            for each in comparisons
        ],
    }


def _verb(difference: Estimate) -> str:
    if not difference.excludes_zero:
        return "no clear difference"
    return "gains" if difference.value > 0 else "loses"
