"""A study's picture: what varies against the share of right answers, with intervals and a dot for each seed."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.studies.page import label_of
from benchmarks.studies.plan import Panel
from benchmarks.studies.results import Results
from evaluation.report.paper import SERVED_COLOUR, fixed_style
from fusionroute.looks import INK, ROUTER_COLOUR

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH_INCHES, ROW_INCHES, HEAD_INCHES = 9.0, 2.75, 0.75
_LOOKS = {"sum": ("o", SERVED_COLOUR), "route": ("s", INK), "select": ("D", "#A6480B"), "mixture": ("^", "#8A6D00"),
          "router": ("P", ROUTER_COLOUR)}  # fmt: skip
_APART = 0.11


def write_picture(results: Results, folder: Path) -> Path:
    """Draws NAME.png into a folder; the same results give the same bytes."""
    path = folder / f"{results.study.name}.png"
    with fixed_style():
        _drawn(results).savefig(path, dpi=150, metadata={"Software": None})
    return path


def _drawn(results: Results) -> Figure:
    from matplotlib.figure import Figure

    panels = results.study.panels
    columns = 3 if len(panels) == 3 else 2
    rows = -(-len(panels) // columns)
    height = HEAD_INCHES + rows * ROW_INCHES
    figure = Figure(figsize=(WIDTH_INCHES, height), facecolor="white")
    has_long_labels = any("\n" in level.label for level in results.study.levels)
    all_axes = figure.subplots(rows, columns, squeeze=False).flat
    for axes, panel in zip(all_axes, panels, strict=False):
        _draw_panel(axes, results, panel)
    figure.text(
        0.012, 1 - 0.09 / height, results.study.title, fontsize=11, fontweight="bold", va="top", color=INK
    )
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="upper left", bbox_to_anchor=(0.006, 1 - 0.27 / height), ncols=len(labels),
                  handlelength=2.2, columnspacing=1.4, fontsize=7.5)  # fmt: skip
    room = 0.6 if has_long_labels else 0.48
    figure.subplots_adjust(left=0.06, right=0.99, top=1 - (HEAD_INCHES + 0.08) / height, bottom=room / height,
                           hspace=0.46, wspace=0.16)  # fmt: skip
    return figure


def _draw_panel(axes: Axes, results: Results, panel: Panel) -> None:
    lines = results.study.lines
    for place, line in enumerate(lines):
        _draw_line(axes, results, panel, line, (place - (len(lines) - 1) / 2) * _APART)
    axes.set_title(panel.title[0].upper() + panel.title[1:])
    axes.set_xticks(range(len(panel.levels)), [results.study.level(name).label for name in panel.levels])
    if any("\n" in results.study.level(name).label for name in panel.levels):
        axes.tick_params(axis="x", labelsize=6.3)
    axes.set_xlim(-0.45, len(panel.levels) - 0.55)
    axes.set_ylim(-0.03, 1.03)
    axes.set_xlabel(panel.axis)
    axes.grid(visible=True, axis="y")


def _draw_line(axes: Axes, results: Results, panel: Panel, line: str, shift: float) -> None:
    phase, _, rule = line.partition("/")
    marker, colour = _LOOKS[rule]
    is_second = phase == "cdpo"
    found = [(place, results.cell(level, line, panel.stratum)) for place, level in enumerate(panel.levels)]
    known = [(place + shift, cell) for place, cell in found if cell is not None]
    x, y = [place for place, _ in known], [cell.estimate.value for _, cell in known]
    ends = [
        [max(0.0, cell.estimate.value - cell.estimate.low) for _, cell in known],
        [max(0.0, cell.estimate.high - cell.estimate.value) for _, cell in known],
    ]
    axes.errorbar(x, y, yerr=ends, color=colour, marker=marker, markersize=4.5, linewidth=1.1, elinewidth=1.1,
                  capsize=1.8, linestyle="-" if is_second else "--", markerfacecolor=colour if is_second else "white",
                  label=label_of(line), zorder=3)  # fmt: skip
    for place, cell in known:
        if len(cell.per_seed) > 1:
            values = list(cell.per_seed.values())
            axes.plot([place + 0.05] * len(values), values, "o", color=colour, markersize=1.8, markeredgewidth=0,
                      alpha=0.65, zorder=4)  # fmt: skip
