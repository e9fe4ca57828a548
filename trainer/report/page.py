"""Puts the panels that have data on one page."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fusionroute.looks import PICTURE_RC
from trainer.report.panels import LOOP_PANELS, PAIR_PANELS, SFT_PANELS, Panel
from trainer.report.records import RunRecords
from trainer.report.still_panels import BIAS_PANELS, draw_ownership

if TYPE_CHECKING:
    from matplotlib.figure import Figure, SubFigure

PICTURE_FILE = "report.png"
NUM_COLUMNS = 3
PAGE_WIDTH_INCHES = 11.0
PANEL_HEIGHT_INCHES = 2.15
OWNER_HEIGHT_INCHES = 0.38
DOTS_PER_INCH = 170


def write_report(folder: Path, title: str = "") -> Path:
    """Draws `report.png` from what lies in the folder of a run; panels without data are left out.

    Args:
        folder: with ``metrics.jsonl`` and, where there are, ``bias.json`` and ``ownership.json``.
        title: of the page; empty = the folder's name.

    Returns:
        The picture, written whole or not at all.

    Raises:
        TrainingFailed: STATE_BROKEN, naming file and line that cannot be read.
    """
    picture = folder / PICTURE_FILE
    figure = draw_page(RunRecords.read(folder), title or folder.name)
    draft = picture.with_name(f".{PICTURE_FILE}.{os.getpid()}")
    try:
        figure.savefig(draft, dpi=DOTS_PER_INCH, format="png", facecolor="white")
        draft.replace(picture)
    finally:
        draft.unlink(missing_ok=True)
    return picture


def panels_of(records: RunRecords) -> list[Panel]:
    """The panels that have something to show, in the order of the page."""
    return [
        panel for panel in (*SFT_PANELS, *PAIR_PANELS, *BIAS_PANELS, *LOOP_PANELS) if panel.has_data(records)
    ]


def draw_page(records: RunRecords, title: str) -> Figure:
    """The whole page as a figure that no window knows of."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    panels = panels_of(records)
    num_rows = -(-len(panels) // NUM_COLUMNS)
    owners = records.ownership["owners"] if records.ownership else []
    ownership_inches = 1.1 + OWNER_HEIGHT_INCHES * len(owners) if owners else 0.0
    heights = [0.42, max(num_rows, 0 if owners else 1) * PANEL_HEIGHT_INCHES, ownership_inches]
    with rc_context(PICTURE_RC):
        layout = ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.06)
        figure = Figure(figsize=(PAGE_WIDTH_INCHES, sum(heights)), layout=layout)
        parts: Any = figure.subfigures(3, 1, height_ratios=[max(height, 1e-3) for height in heights])
        steps = f"{records.num_steps:,} step{'s' * (records.num_steps != 1)}" if records.num_steps else ""
        parts[0].text(0.008, 0.45, title, fontsize=13, fontweight="bold", va="center")
        parts[0].text(0.992, 0.45, steps, fontsize=9, va="center", ha="right")
        _draw_panels(parts[1], panels, records, num_rows)
        if owners:
            draw_ownership(parts[2], records)
        figure.draw_without_rendering()
    return figure


def _draw_panels(part: SubFigure, panels: list[Panel], records: RunRecords, num_rows: int) -> None:
    if not panels:
        part.text(0.5, 0.5, "nothing was logged", ha="center", va="center", fontsize=10)
        return
    from matplotlib.ticker import MaxNLocator

    num_columns = min(NUM_COLUMNS, len(panels))
    grid = part.add_gridspec(num_rows, num_columns)
    for place, panel in enumerate(panels):
        axes = part.add_subplot(grid[divmod(place, num_columns)])
        axes.set_title(panel.title)
        panel.draw(axes, records)
        if panel not in BIAS_PANELS:
            axes.set_xlabel("step")
            axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=5))
