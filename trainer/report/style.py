"""How the report looks: one colour for each expert slot in all panels, the hues that the terminal gives it.

Vivid colours belong to experts and router alone; losses, responses and the like are muted and told apart by the kind
of their line too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# cyan, yellow, green, magenta, blue, ... in the order of fusionroute.cli.render.STYLES, dark enough for paper
SLOT_COLOURS = ("#16A3B8", "#E3A008", "#2F9E5B", "#B4469B", "#3B5BDB", "#0B6B79", "#A67506", "#74B816")
ROUTER_COLOUR = "#D6402F"
NOBODY_COLOUR = "#8C949E"
INK = "#22272E"
FAINT = "#D9DDE3"

RC: Any = {
    "font.family": "DejaVu Sans",
    "font.size": 8.0,
    "axes.titlesize": 9.0,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 7.0,
    "axes.labelsize": 8.0,
    "axes.labelcolor": INK,
    "axes.edgecolor": "#9AA3AE",
    "axes.linewidth": 0.7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": FAINT,
    "grid.linewidth": 0.5,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.labelsize": 7.5,
    "ytick.labelsize": 7.5,
    "xtick.major.size": 2.5,
    "ytick.major.size": 2.5,
    "lines.linewidth": 1.5,
    "lines.solid_capstyle": "round",
    "legend.fontsize": 7.5,
    "legend.frameon": False,
}


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


def slot_colours(slots: Sequence[str]) -> dict[str, str]:
    """A colour for each slot, by its place in the checkpoint."""
    return {slot: SLOT_COLOURS[place % len(SLOT_COLOURS)] for place, slot in enumerate(slots)}


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
