"""Every system on every part of a division of many parts, for example on every task: a grid of shaded numbers."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from evaluation.findings import SCORE
from evaluation.report.paper import (
    MARGIN,
    NORMAL,
    SMALL,
    WIDTH_INCHES,
    Sheet,
    drawable,
    heading_inches,
    shortened,
    text_inches,
    wrapped,
)
from evaluation.report.rows import GAP_INCHES, LINE_INCHES, MOST_LABEL_INCHES
from evaluation.report.view import Columns, View, part_of
from fusionroute.looks import INK

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MOST_COLUMNS = 26
ROW_INCHES, TALL_ROW_INCHES = 0.23, 0.35
MOST_HEAD_INCHES = 1.2
LIGHT, DARK = (246, 248, 251), (17, 62, 115)
"""Red, green, blue of 0 and of 1, with all greys between them."""


def draw_heatmap(view: View, columns: Columns) -> list[Sheet]:
    """Shares in per cent, losses as they are, systems down the page; several sheets for very many parts."""
    strata = [stratum for stratum in columns.strata if view.num_questions(stratum)]
    if not strata:
        return []
    num_sheets = -(-len(strata) // MOST_COLUMNS)
    size = -(-len(strata) // num_sheets)
    return [_draw(view, columns.name, strata[start : start + size]) for start in range(0, len(strata), size)]


def _draw(view: View, name: str, strata: list[str]) -> Sheet:
    title = f"{view.look.parts}, by {name}"
    of_each = " of each seed" if len(view.seeds) > 1 else ""
    unit = "; darker is better within its column" if view.look.least is None else " in per cent"
    amount = (
        f"{_numbers(view, strata)} {view.look.things}"
        if view.look.measure != SCORE
        else f"n = {_numbers(view, strata)}"
    )
    told = f"{view.look.told}{unit}; {amount}{of_each}. Intervals are in report.json."
    widest = max(text_inches(note.label, NORMAL) for note in view.systems)
    label_inches = min(widest, MOST_LABEL_INCHES) + 0.01
    labels = [wrapped(note.label, label_inches, NORMAL, 2) for note in view.systems]
    row_inches = TALL_ROW_INCHES if any(len(lines) > 1 for lines in labels) else ROW_INCHES
    heads = [shortened(part_of(stratum), MOST_HEAD_INCHES, SMALL) for stratum in strata]
    head_inches = max(text_inches(head, SMALL) for head in heads) + 0.1
    top = heading_inches(title, told) + head_inches
    body = row_inches * len(labels)
    sheet = Sheet(top + body + MARGIN)
    sheet.heading(title, told)
    for row, lines in enumerate(labels):
        first = top + (row + 0.5) * row_inches - LINE_INCHES * (len(lines) - 1) / 2
        for place, line in enumerate(lines):
            sheet.text(MARGIN, first + place * LINE_INCHES, line, va="center_baseline")
    left = MARGIN + label_inches + GAP_INCHES / 2
    width = min(WIDTH_INCHES - MARGIN - left, 0.8 * len(strata))
    axes = sheet.axes(left, top, width, body)
    axes.set_axis_off()
    axes.set(xlim=(0, len(strata)), ylim=(len(labels), 0))
    for column, (head, stratum) in enumerate(zip(heads, strata, strict=True)):
        sheet.text(left + (column + 0.5) * width / len(strata), top - 0.05, head, size=SMALL, rotation=90,
                   va="bottom", ha="center")  # fmt: skip
        for row, (depth, number) in _shades(view, stratum).items():
            _draw_cell(axes, row, column, depth, number)
    return sheet


def _shades(view: View, stratum: str) -> dict[int, tuple[float, str]]:
    """By row how dark a cell is, from 0 to 1, and what stands in it.

    Shares are as dark as they are great. Losses have no greatest one: the least of the column is dark, the greatest
    light, and all are half dark where they are the same.
    """
    cells = [view.cell(note.name, stratum) for note in view.systems]
    found = {row: cell.estimate.value for row, cell in enumerate(cells)
             if cell and math.isfinite(cell.estimate.value)}  # fmt: skip
    if view.look.least is not None:
        return {row: (min(max(value, 0.0), 1.0), f"{100 * value:.0f}") for row, value in found.items()}
    low, high = min(found.values(), default=0.0), max(found.values(), default=0.0)
    wide = high - low
    return {row: ((high - value) / wide if wide else 0.5, f"{value:.2f}") for row, value in found.items()}


def _draw_cell(axes: Axes, row: int, column: int, depth: float, number: str) -> None:
    from matplotlib.patches import Rectangle

    red, green, blue = (low + (high - low) * depth for low, high in zip(LIGHT, DARK, strict=True))
    axes.add_artist(Rectangle((column + 0.03, row + 0.03), 0.94, 0.94, linewidth=0,
                             facecolor=(red / 255, green / 255, blue / 255)))  # fmt: skip
    axes.text(column + 0.5, row + 0.5, drawable(number), ha="center", va="center_baseline",
              fontsize=SMALL, color="white" if depth > 0.54 else INK)  # fmt: skip


def _numbers(view: View, strata: list[str]) -> str:
    numbers = {view.num_questions(stratum) for stratum in strata}
    return numbers.pop() if len(numbers) == 1 else "different numbers"
