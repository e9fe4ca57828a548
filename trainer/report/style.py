"""How the report's lines look, and how their names stand beside them.

Vivid colours belong to experts and router alone (fusionroute.looks); losses, responses and the like are muted and told
apart by the kind of their line too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fusionroute.looks import INK

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass(frozen=True, slots=True)
class Line:
    """One metric in a panel."""

    name: str
    label: str
    colour: str
    dashes: str = "-"


LOSSES = (
    Line("loss", "total", INK),
    Line("loss/lm", "LM", "#5B7083", "--"),
    Line("loss/expert", "expert", "#9A7B5B", "-."),
    Line("loss/cdpo", "CDPO", "#7D5BA6", ":"),
)
CHOSEN_COLOUR, REJECTED_COLOUR = "#2B4162", "#C26A3D"


def label_at_right(axes: Axes, labels: Sequence[tuple[float, str, str]]) -> None:
    """Writes names at the right edge, beside where their lines end, moved apart where they would overlap.

    Args:
        axes: with its limits settled.
        labels: (height in data units, text, colour) of each.
    """
    low, high = axes.transData.transform([(0, axes.get_ylim()[0]), (0, axes.get_ylim()[1])])[:, 1]
    placed = sorted(
        ((axes.transData.transform((0, height))[1] - low) / (high - low), text, colour)
        for height, text, colour in labels
    )
    heights = spread([height for height, _, _ in placed], room=0.105)
    for height, (_, text, colour) in zip(heights, placed, strict=True):
        axes.annotate(
            text,
            (1.0, height),
            xycoords="axes fraction",
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
            fontsize=7.5,
            color=colour,
            fontweight="bold",
            annotation_clip=False,
        )


def spread(heights: Sequence[float], room: float) -> list[float]:
    """Sorted heights, moved as little as a few sweeps allow so that neighbours are `room` apart, within [0, 1]."""
    moved = [min(max(height, 0.0), 1.0) for height in heights]
    for _ in range(100):
        for place in range(len(moved) - 1):
            lacking = room - (moved[place + 1] - moved[place])
            if lacking > 0:
                moved[place] -= lacking / 2
                moved[place + 1] += lacking / 2
        if moved and moved[0] < 0:
            moved[0] = 0.0
        if moved and moved[-1] > 1:
            moved[-1] = 1.0
    return moved
