"""Draws what a benchmark has found: one picture for each suite, its panels in rows of two."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evaluation.bench_report import Bars, Lines, Panel, Report, Stacks

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# told apart also by those who see no red or green, and in grey
COLOURS = ("#2B4C7E", "#E08E0B", "#3A9D8F", "#B5485D", "#7A6FB0", "#8C949E", "#5B8C2A", "#B08968")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
INK, FAINT = "#22272E", "#E3E6EB"
RC: Any = {
    "font.family": "DejaVu Sans", "font.size": 8.5, "text.color": INK,
    "axes.titlesize": 10.0, "axes.titleweight": "bold", "axes.titlelocation": "left", "axes.titlepad": 9.0,
    "axes.labelsize": 8.5, "axes.labelcolor": INK, "axes.edgecolor": "#9AA3AE", "axes.linewidth": 0.7,
    "axes.spines.top": False, "axes.spines.right": False, "axes.axisbelow": True,
    "grid.color": FAINT, "grid.linewidth": 0.6, "xtick.color": INK, "ytick.color": INK,
    "xtick.major.size": 2.5, "ytick.major.size": 0.0, "legend.frameon": False, "legend.fontsize": 8.0,
    "lines.linewidth": 1.6, "lines.markersize": 4.5,
}  # fmt: skip
NUM_COLUMNS = 2
PAGE_WIDTH_INCHES = 10.5
HEADING_INCHES = 0.62
LINES_INCHES, BAR_INCHES, FRAME_INCHES = 2.9, 0.34, 1.15
DOTS_PER_INCH = 160


def write_plot(report: Report, path: Path) -> None:
    """Draws a report's panels into a PNG file, written whole or not at all."""
    figure = draw(report)
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        figure.savefig(draft, dpi=DOTS_PER_INCH, format="png", facecolor="white")
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


def draw(report: Report) -> Figure:
    """The picture as a figure that no window knows of."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    columns = min(NUM_COLUMNS, len(report.panels))
    grid = [report.panels[start : start + columns] for start in range(0, len(report.panels), columns)]
    heights = [max(_height_inches(panel) for panel in row) for row in grid]
    with rc_context(RC):
        layout = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.08)
        size = (PAGE_WIDTH_INCHES, HEADING_INCHES + sum(heights))
        figure = Figure(figsize=size, layout=layout)
        parts: Any = figure.subfigures(2, 1, height_ratios=[HEADING_INCHES, sum(heights)])
        parts[0].text(0.012, 0.68, report.question, fontsize=12.5, fontweight="bold", va="center")
        parts[0].text(0.012, 0.18, _told(report), fontsize=8, va="center", color="#5B6570")
        cells = parts[1].add_gridspec(len(grid), columns, height_ratios=heights)
        for row, panels in enumerate(grid):
            for column, panel in enumerate(panels):
                _draw_panel(parts[1].add_subplot(cells[row, column]), panel)
        figure.draw_without_rendering()
    return figure


def _told(report: Report) -> str:
    """The configuration in a line, as far as a reader of the picture needs it."""
    facts = report.configuration
    words = [str(facts[name]) for name in ("family", "dtype") if facts.get(name)]
    if "hidden" in facts:
        words.append(
            f"hidden {facts['hidden']}, {facts['layers']} layers, vocabulary {facts['vocabulary']:,}"
        )
    words += [f"{facts[name]} {name}" for name in ("cores", "runs") if name in facts]
    return f"fusionroute bench {report.suite}  ·  " + "  ·  ".join(words)


def _height_inches(panel: Panel) -> float:
    match panel:
        case Bars():
            return FRAME_INCHES + BAR_INCHES * len(panel.values)
        case Stacks():
            return FRAME_INCHES + 0.3 + BAR_INCHES * len(panel.bars)
        case Lines():
            return LINES_INCHES


def _draw_panel(axes: Axes, panel: Panel) -> None:
    axes.set_title(panel.title)
    match panel:
        case Bars():
            _draw_bars(axes, panel)
        case Stacks():
            _draw_stacks(axes, panel)
        case Lines():
            _draw_lines(axes, panel)


def _draw_bars(axes: Axes, panel: Bars) -> None:
    names = list(panel.values)
    medians = [each.median for each in panel.values.values()]
    whiskers = [[each.median - each.low for each in panel.values.values()],
                [each.high - each.median for each in panel.values.values()]]  # fmt: skip
    axes.barh(range(len(names)), medians, height=0.62, color=COLOURS[0])
    axes.errorbar(
        medians, range(len(names)), xerr=whiskers, fmt="none", ecolor=INK, elinewidth=0.9, capsize=2
    )
    least = min(each.low for each in panel.values.values())
    largest = max(each.high for each in panel.values.values())
    for place, each in enumerate(panel.values.values()):
        axes.text(each.high + 0.015 * largest, place, number(each.median), va="center", fontsize=8)
    if panel.reference is not None:
        axes.axvline(panel.reference, color=COLOURS[3], linewidth=1.0, linestyle="--")
    axes.set_xlim(1.1 * min(0.0, least), 1.16 * max(largest, panel.reference or 0.0) or 1.0)
    _finish_bars(axes, names, panel.unit)


def _draw_stacks(axes: Axes, panel: Stacks) -> None:
    names = list(panel.bars)
    parts = list(dict.fromkeys(part for of_bar in panel.bars.values() for part in of_bar))
    lefts = [0.0] * len(names)
    for place, part in enumerate(parts):
        widths = [max(0.0, panel.bars[name].get(part, 0.0)) for name in names]
        colour = COLOURS[place % len(COLOURS)]
        axes.barh(range(len(names)), widths, left=lefts, height=0.62, color=colour, label=part)
        lefts = [left + width for left, width in zip(lefts, widths, strict=True)]
    for place, left in enumerate(lefts):
        axes.text(left + 0.015 * max(lefts), place, number(left), va="center", fontsize=8)
    axes.set_xlim(0, 1.14 * max(lefts) or 1.0)
    axes.legend(ncols=3, loc="upper left", bbox_to_anchor=(0.0, -0.26), columnspacing=1.2, handlelength=1.0)
    _finish_bars(axes, names, panel.unit)


def _finish_bars(axes: Axes, names: Sequence[str], unit: str) -> None:
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.45, -0.55)
    axes.set_xlabel(unit)
    axes.grid(axis="x")
    axes.spines["left"].set_visible(False)


def _draw_lines(axes: Axes, panel: Lines) -> None:
    for place, (name, points) in enumerate(panel.lines.items()):
        xs, ys = [x for x, _ in points], [y for _, y in points]
        marker = MARKERS[place % len(MARKERS)] if len(points) <= 12 else None
        axes.plot(xs, ys, color=COLOURS[place % len(COLOURS)], marker=marker, label=name)
    if panel.has_log_x:
        axes.set_xscale("log", base=2)
        ticks = sorted({x for points in panel.lines.values() for x, _ in points})
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.minorticks_off()
    axes.set_ylim(0, 1.08 * max(y for points in panel.lines.values() for _, y in points))
    axes.set_xlabel(panel.x_label)
    axes.set_ylabel(panel.y_label)
    axes.grid(axis="y")
    if len(panel.lines) > 1:
        axes.legend()


def number(value: float) -> str:
    """With as many digits as say something."""
    size = abs(value)
    if size >= 1000:
        return f"{value:,.0f}"
    return f"{value:.0f}" if size >= 100 else f"{value:.1f}" if size >= 10 else f"{value:.2f}"
