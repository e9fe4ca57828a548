"""How experts are told apart wherever people look: one colour and one mark for each slot, in terminal and pictures.

Vivid colours belong to experts and router alone. Colour is never the only sign: where an expert is shown, so is its
mark, a letter of its name.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

# cyan, yellow, green, magenta, blue, ... in the order of fusionroute.cli.render.STYLES, dark enough for paper
SLOT_COLOURS = ("#16A3B8", "#E3A008", "#2F9E5B", "#B4469B", "#3B5BDB", "#0B6B79", "#A67506", "#74B816")
ROUTER_COLOUR = "#D6402F"
NOBODY_COLOUR = "#8C949E"
INK = "#22272E"
FAINT = "#D9DDE3"

ROUTER_MARK = "+"
_SPARE_MARKS = "0123456789"

PICTURE_RC: Any = {
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


def slot_colours(slots: Sequence[str]) -> dict[str, str]:
    """A colour for each slot, by its place in the checkpoint."""
    return {slot: SLOT_COLOURS[place % len(SLOT_COLOURS)] for place, slot in enumerate(slots)}


def slot_marks(slots: Sequence[str]) -> dict[str, str]:
    """A mark for each slot, by its place in the checkpoint, and the router's for ""."""
    marks = {"": ROUTER_MARK}
    for slot in slots:
        marks[slot] = next_mark(slot, marks.values())
    return marks


def next_mark(slot: str, taken: Collection[str]) -> str:
    """One character for a slot, a letter of its name where one is free; "?" when nothing is."""
    free = (mark for mark in (*slot, *slot.upper(), *_SPARE_MARKS) if mark not in taken)
    return next(free, "?")
