"""A page of rows with columns beside their labels: what the forest plots and the stacked bars stand on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

from evaluation.report.paper import (
    BAND_COLOUR,
    MARGIN,
    MUTED,
    NORMAL,
    SMALL,
    WIDTH_INCHES,
    Sheet,
    heading_inches,
    text_inches,
    wrapped,
)
from evaluation.report.signs import Sign, draw_signs, signs_inches
from fusionroute.looks import FAINT

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MOST_LABEL_INCHES, MOST_LABEL_BESIDE_MANY_INCHES = 2.35, 1.9
MANY_COLUMNS = 5
ROW_INCHES, TALL_ROW_INCHES = 0.27, 0.36
HEAD_INCHES, FOOT_INCHES, LINE_INCHES = 0.38, 0.34, 0.17
GAP_INCHES = 0.16


@dataclass(frozen=True, slots=True)
class Head:
    """What stands above a column: its name, and in smaller letters what it is of."""

    name: str
    told: str = ""


@dataclass(frozen=True, slots=True)
class Plan:
    """What a page is made of.

    Attributes:
        labels: of the rows, downwards.
        bold: rows whose labels are bold.
        heads: of the columns.
        signs: of the legend below the rows.
        right_inches: room left free at the right of every column, for numbers.
        row_inches: height of a row; more where a label takes two lines.
    """

    title: str
    told: str
    labels: Sequence[str]
    heads: Sequence[Head]
    bold: frozenset[int] = frozenset()
    signs: Sequence[Sign] = ()
    right_inches: float = 0.0
    row_inches: float = ROW_INCHES


class RowPage:
    """A sheet with rows and columns; row r lies at height r of every column's axes, row 0 at the top."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        widest = max((text_inches(label, NORMAL, "bold") for label in plan.labels), default=0.0)
        is_narrow = len(plan.heads) >= MANY_COLUMNS
        most = MOST_LABEL_BESIDE_MANY_INCHES if is_narrow else MOST_LABEL_INCHES
        self._label_inches = min(widest, most)
        self._lines = [
            wrapped(label, self._label_inches + 0.01, NORMAL, 2, "bold" if row in plan.bold else "normal")
            for row, label in enumerate(plan.labels)
        ]
        is_tall = any(len(lines) > 1 for lines in self._lines)
        self.row_inches = max(plan.row_inches, TALL_ROW_INCHES if is_tall else 0.0)
        self._top = heading_inches(plan.title, plan.told) + HEAD_INCHES
        self._body = self.row_inches * len(plan.labels)
        legend_top = self._top + self._body + FOOT_INCHES
        self.sheet = Sheet(legend_top + signs_inches(plan.signs) + MARGIN)
        self.sheet.heading(plan.title, plan.told)
        self._draw_rows()
        self.columns = list(self._make_columns())
        draw_signs(self.sheet, legend_top, plan.signs)

    def _draw_rows(self) -> None:
        for row, lines in enumerate(self._lines):
            top = self._top + row * self.row_inches
            if row % 2 == 0:
                self.sheet.box(
                    MARGIN / 2, top, WIDTH_INCHES - MARGIN, self.row_inches, facecolor=BAND_COLOUR, zorder=-2
                )
            weight = "bold" if row in self.plan.bold else "normal"
            first = top + self.row_inches / 2 - LINE_INCHES * (len(lines) - 1) / 2
            for place, line in enumerate(lines):
                self.sheet.text(
                    MARGIN, first + place * LINE_INCHES, line, va="center_baseline", weight=weight
                )

    def _make_columns(self) -> Iterator[Axes]:
        left = MARGIN + self._label_inches + GAP_INCHES
        each = (WIDTH_INCHES - MARGIN - left) / len(self.plan.heads)
        width = each - self.plan.right_inches - GAP_INCHES
        for place, head in enumerate(self.plan.heads):
            start = left + place * each
            names = wrapped(head.name, each - GAP_INCHES, NORMAL, 1 if head.told else 2, "bold")
            first = self._top - 0.04 - LINE_INCHES * (len(names) + bool(head.told))
            for line, name in enumerate(names):
                self.sheet.text(start, first + line * LINE_INCHES, name, weight="bold")
            if head.told:
                self.sheet.text(start, self._top - 0.04 - LINE_INCHES, head.told, size=SMALL, color=MUTED)
            axes = self.sheet.axes(start, self._top, width, self._body)
            axes.set_ylim(len(self.plan.labels) - 0.5, -0.5)
            axes.tick_params(axis="y", left=False, labelleft=False)
            axes.spines["left"].set_visible(False)
            axes.patch.set_visible(False)
            axes.grid(visible=True, axis="x", color=FAINT, linewidth=0.6)
            yield axes


def settle(axes: Axes, low: float, high: float, label: Callable[[float], str]) -> None:
    """Limits of a column, and as many ticks as have room for their labels."""
    from matplotlib.ticker import MaxNLocator

    axes.set_xlim(low, high)
    inches = axes.get_position().width * WIDTH_INCHES / (high - low)
    for most_steps in (4, 3, 2, 1):
        found = MaxNLocator(most_steps, steps=[1, 2, 2.5, 5, 10], min_n_ticks=1).tick_values(low, high)
        ticks = [float(tick) for tick in found if low <= tick <= high]
        halves = [text_inches(label(tick), SMALL) / 2 for tick in ticks]
        gaps = [(after - before) * inches for before, after in pairwise(ticks)]
        if all(gap >= one + other + 0.05 for gap, (one, other) in zip(gaps, pairwise(halves), strict=True)):
            break
    axes.set_xticks(ticks, [label(tick) for tick in ticks])
