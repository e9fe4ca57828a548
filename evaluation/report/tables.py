"""The tables of a report, as rows of text: for Markdown, and the main one for a terminal."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from evaluation.findings import SCORE, Comparison, Findings
from evaluation.report.measures import look_of
from evaluation.report.paper import MINUS, signed
from evaluation.report.view import NOT_IN_COMPETITION, Columns, View, part_of
from evaluation.statistics.intervals import Estimate

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

MISSING = "–"
MCNEMAR_HEAD = "McNemar's p, unadjusted"
LEAST_NAME_CELLS = 20
MEAN_WITH_INTERVAL = "0.953 [0.941, 0.964]"
UNSURE_MARK = " ‡"
"""Beside a difference that is significant on these questions, but not beyond the seeds that were tried."""


@dataclass(frozen=True, slots=True)
class TextTable:
    """Cells as text; the first column is of names, all others of numbers.

    Attributes:
        bold: (row, column) of the cells that stand out.
    """

    heads: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    bold: frozenset[tuple[int, int]] = frozenset()

    def to_markdown(self) -> str:
        """A table of GitHub's Markdown."""
        lines = [_line(escaped(head) for head in self.heads), "|---|" + "---:|" * (len(self.heads) - 1)]
        for place, row in enumerate(self.rows):
            cells = [escaped(cell) for cell in row]
            lines.append(
                _line(
                    f"**{cell}**" if (place, column) in self.bold else cell
                    for column, cell in enumerate(cells)
                )
            )
        return "\n".join(lines) + "\n"


def main_table(view: View, columns: Columns) -> TextTable:
    """Systems down, strata across, each mean with its interval; bold is what leads significantly."""
    texts = "" if view.look.measure == SCORE else f" {view.look.things}"
    heads = [f"{part_of(stratum)} (n = {view.num_questions(stratum)}{texts})" for stratum in columns.strata]
    best = [view.best(stratum) for stratum in columns.strata]
    rows, bold = [], set()
    for row, note in enumerate(view.systems):
        mark = " †" if note.kind == NOT_IN_COMPETITION else ""
        cells = [view.cell(note.name, stratum) for stratum in columns.strata]
        rows.append((note.label + mark, *(shown(cell.estimate) if cell else MISSING for cell in cells)))
        bold |= {(row, 1 + place) for place, name in enumerate(best) if name == note.name}
    return TextTable(("system", *heads), tuple(rows), frozenset(bold))


def seeds_table(view: View, columns: Columns) -> TextTable | None:
    """Each seed's mean; None with one seed."""
    if len(view.seeds) < 2:
        return None
    heads = [f"{part_of(stratum)}, seeds {', '.join(map(str, view.seeds))}" for stratum in columns.strata]
    rows = []
    for note in view.systems:
        cells = [view.cell(note.name, stratum) for stratum in columns.strata]
        rows.append((note.label, *(
            " ".join(f"{cell.per_seed[seed]:.3f}" if seed in cell.per_seed else MISSING for seed in view.seeds)
            if cell else MISSING for cell in cells
        )))  # fmt: skip
    return TextTable(("system", *heads), tuple(rows))


def parts_table(view: View, columns: Columns) -> TextTable:
    """Parts down, systems by number across: for divisions of many parts."""
    heads = [str(number) for number, _ in enumerate(view.systems, start=1)]
    strata = [stratum for stratum in columns.strata if view.num_questions(stratum)]
    rows, bold = [], set()
    for row, stratum in enumerate(strata):
        cells = [view.cell(note.name, stratum) for note in view.systems]
        rows.append(
            (part_of(stratum), *(f"{cell.estimate.value:.3f}" if cell else MISSING for cell in cells))
        )
        best = view.best(stratum)
        bold |= {(row, 1 + place) for place, note in enumerate(view.systems) if note.name == best}
    return TextTable((columns.name, *heads), tuple(rows), frozenset(bold))


def widest_interval(view: View, columns: Columns) -> float:
    """Half the width of the widest interval in these strata."""
    halves = [
        (cell.estimate.high - cell.estimate.low) / 2
        for cell in view.findings.cells
        if cell.stratum in columns.strata
    ]
    return max(halves, default=0.0)


def comparisons_table(view: View, comparisons: Sequence[Comparison]) -> TextTable:
    """A row for each; the smallest detectable difference stands beside null results.

    McNemar's p has a column where it differs in kind from the one that is adjusted: where several answers hang
    together, questions of one cluster or answers of several seeds to one question.
    """
    several = any(each.over_seeds or each.mixed for each in comparisons)
    heads = (
        *("first − second", view.look.things, "difference"),
        *(("over seeds", "mixed") if several else ()),
        *(view.look.ahead, "p after Holm"),
        *(
            (MCNEMAR_HEAD,)
            if (shows_mcnemar := any(is_mcnemar_another(each) for each in comparisons))
            else ()
        ),
        "detectable",
    )
    rows = []
    for each in comparisons:
        over = [shown(some, plus=True) if some else MISSING for some in (each.over_seeds, each.mixed)]
        rows.append((
            f"{view.label(each.first)} {MINUS} {view.label(each.second)}",
            f"{part_of(each.stratum)}, {each.num_questions:,}",
            shown(each.difference, plus=True) + (UNSURE_MARK if is_unsure_over_seeds(each) else ""),
            *(over if several else ()),
            f"{each.only_first:,}, {each.only_second:,}",
            probability(each.p_adjusted),
            *((MISSING if each.mcnemar is None else probability(each.mcnemar),) if shows_mcnemar else ()),
            MISSING if each.is_significant else detectable(each),
        ))  # fmt: skip
    bold = frozenset((row, 2) for row, each in enumerate(comparisons) if each.is_significant)
    return TextTable(heads, tuple(rows), bold)


def is_mcnemar_another(comparison: Comparison) -> bool:
    """Whether McNemar's test is not the test that was made, since not every answer is a cluster of its own."""
    num_answers = comparison.num_questions * max(1, len(comparison.per_seed))
    return comparison.mcnemar is not None and comparison.num_clusters < num_answers


def detectable(comparison: Comparison) -> str:
    """The smallest difference that would probably have been shown: "±0.137"."""
    return f"±{comparison.detectable:.3f}" if math.isfinite(comparison.detectable) else "none can be shown"


def is_unsure_over_seeds(comparison: Comparison) -> bool:
    """Whether it is significant, and yet the interval over its seeds holds zero."""
    over = comparison.over_seeds
    return comparison.is_significant and over is not None and not over.excludes_zero


def null_sentence(view: View, comparison: Comparison) -> str:
    """What a null result says, with no more certainty than it has."""
    division, _, part = comparison.stratum.partition("=")
    look = look_of(comparison.measure)
    where = f"where {division} is {part}" if part else f"on all {look.things}"
    number = f"{comparison.num_questions:,} {look.things}"
    would = (
        f"would show one of {comparison.detectable:.3f}{look.unit} with 80 % power"
        if math.isfinite(comparison.detectable)
        else "cannot show any"
    )
    return (
        f"{view.label(comparison.first)} against {view.label(comparison.second)} {where}: no difference shown "
        f"({shown(comparison.difference, plus=True)}{look.unit}, p = {probability(comparison.p_adjusted)} after Holm); "
        f"these {number} {would}."
    )


def shown(estimate: Estimate, *, plus: bool = False) -> str:
    """An estimate in the form "0.953 [0.941, 0.964]"; with `plus` every number has a sign."""
    numbers = (estimate.value, estimate.low, estimate.high)
    value, low, high = (signed(each) if plus else f"{each:z.3f}".replace("-", MINUS) for each in numbers)
    return f"{value} [{low}, {high}]"


def probability(value: float) -> str:
    """ "0.032", or "< 0.001"."""
    return f"{value:.3f}" if value >= 0.001 else "< 0.001"


def print_main_table(findings: Findings, console: Console | None = None) -> None:
    """The main table of each measure at the terminal, then the summary's sentences."""
    from rich.console import Console
    from rich.text import Text

    console = console or Console()
    view = View(findings)
    for number, measured in enumerate(view.by_measure):
        if measured.look.measure != SCORE or len(view.by_measure) > 1:
            heading = f"{measured.look.told}; {measured.look.better}"
            console.print(Text(f"{chr(10) if number else ''}{heading}", style="bold"))
        for columns in measured.narrow[:1]:
            console.print(_rich_table(main_table(measured, columns), console.width))
    for sentence in findings.summary:
        console.print(Text(f"\n{sentence}"))


def _rich_table(table: TextTable, width: int) -> Table:
    """Intervals stand below their means where they do not fit beside them."""
    from rich.table import Table
    from rich.text import Text

    made = Table(box=None, pad_edge=False)
    needed = LEAST_NAME_CELLS + sum(2 + len(MEAN_WITH_INTERVAL) for _ in table.heads[1:])
    below = "\n[" if needed > width else " ["
    for column, head in enumerate(table.heads):
        made.add_column(
            Text(head.replace(" (", "\n(")), justify="right" if column else "left", overflow="fold"
        )
    for row, (name, *numbers) in enumerate(table.rows):
        cells = [name, *(number.replace(" [", below) for number in numbers)]
        made.add_row(*(
            Text(cell, style="bold" if (row, column) in table.bold else "") for column, cell in enumerate(cells)
        ))  # fmt: skip
    return made


def escaped(text: str) -> str:
    """Text that Markdown shows as it is, in one line of a table."""
    in_a_line = " ".join(text.split())
    return "".join(f"\\{each}" if each in "\\|*_`<>#~" else each for each in in_a_line).replace("](", "]\\(")


def _line(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |"
