"""Legends: signs with their meanings, in as many lines as they need."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from evaluation.report.paper import HATCHES, MARGIN, MUTED, SMALL, WIDTH_INCHES, Sheet, drawable, text_inches
from fusionroute.looks import INK, ROUTER_COLOUR, SLOT_COLOURS, slot_colours, slot_marks

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LEGEND_LINE_INCHES = 0.21


@dataclass(frozen=True, slots=True)
class Sign:
    """An entry of a legend: a point where `marker` is given, else a patch with the letter that stands in it.

    Attributes:
        face: colour within; that of `edge` for "".
        dashes: whether the patch has a dashed frame.
    """

    meaning: str
    edge: str
    face: str = ""
    marker: str = ""
    hatch: str = ""
    letter: str = ""
    dashes: bool = False

    def draw(self, axes: Axes, left: float, top: float) -> None:
        """With its middle at a place of axes in inches."""
        from matplotlib.patches import Rectangle

        face = self.face or self.edge
        if self.marker:
            axes.plot([left], [top], self.marker, color=self.edge, markerfacecolor=face, markersize=5,
                      markeredgewidth=1.2)  # fmt: skip
            return
        axes.add_artist(Rectangle((left - 0.07, top - 0.07), 0.14, 0.14, facecolor=face,
                                 edgecolor=INK if self.dashes else "white", hatch=self.hatch,
                                 linewidth=0.8 if self.dashes else 0, linestyle=(0, (2.5, 1.8))))  # fmt: skip
        axes.text(left, top, drawable(self.letter), ha="center", va="center_baseline", fontsize=SMALL,
                  fontweight="bold", color=INK, bbox=letter_ground() if self.letter else None)  # fmt: skip


def letter_ground() -> Any:
    """What lies behind a letter on a hatched ground."""
    return {"boxstyle": "round,pad=0.12", "facecolor": "white", "alpha": 0.85, "linewidth": 0}


def slot_signs(slots: Sequence[str]) -> dict[str, Sign]:
    """Colour, hatch and letter of each slot, "" being the router alone."""
    experts = [slot for slot in slots if slot]
    colours, marks = slot_colours(experts), slot_marks(experts)
    signs = {
        slot: Sign(slot, colours[slot], hatch=_hatch(place), letter=marks[slot])
        for place, slot in enumerate(experts)
    }
    if "" in slots:
        signs[""] = Sign("router alone", ROUTER_COLOUR, letter=marks[""])
    return signs


def _hatch(place: int) -> str:
    """Colours come round again after eight slots; the hatches by then are others."""
    return HATCHES[(place + place // len(SLOT_COLOURS)) % len(HATCHES)]


def draw_signs(sheet: Sheet, top: float, signs: Sequence[Sign]) -> None:
    """Draws them from `top` inches downwards, `signs_inches` high."""
    if not signs:
        return
    width, height = WIDTH_INCHES - 2 * MARGIN, signs_inches(signs)
    axes = sheet.axes(MARGIN, top, width, height)
    axes.set_axis_off()
    axes.set(xlim=(0, width), ylim=(height, 0))
    for (left, line), sign in zip(_places(signs), signs, strict=True):
        sign.draw(axes, left + 0.07, line + LEGEND_LINE_INCHES / 2)
        axes.text(left + 0.2, line + LEGEND_LINE_INCHES / 2, drawable(sign.meaning), va="center_baseline",
                  fontsize=SMALL, color=MUTED)  # fmt: skip


def signs_inches(signs: Sequence[Sign]) -> float:
    """How much room they take."""
    return LEGEND_LINE_INCHES + max((top for _, top in _places(signs)), default=-LEGEND_LINE_INCHES)


def _places(signs: Sequence[Sign]) -> list[tuple[float, float]]:
    """Left and top of each sign, line by line."""
    places, left, top = [], 0.0, 0.0
    for sign in signs:
        width = 0.2 + text_inches(sign.meaning, SMALL) + 0.2
        if left and left + width > WIDTH_INCHES - 2 * MARGIN:
            left, top = 0.0, top + LEGEND_LINE_INCHES
        places.append((left, top))
        left += width
    return places
