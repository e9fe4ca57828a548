"""An example answer token by token: who took part, how sure the routing was, and where the complement overruled.

   ]̶             what the expert would have written, where it was overruled
┌─┬─┬─┬─┬─┬─┐
│[│8│␣│k│g│]│     the answer, in the colours of the experts
└─┴─┴─┴─┴─┴─┘
 f m m s s f      their letters
math      ▒█▓░░   routing weights, darker for more
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from evaluation.findings import TracedAnswer, TracedToken
from evaluation.report.paper import (
    MARGIN,
    MUTED,
    NORMAL,
    SMALL,
    WIDTH_INCHES,
    Sheet,
    drawable,
    heading_inches,
    shortened,
    text_inches,
    visible,
)
from evaluation.report.signs import Sign, draw_signs, signs_inches, slot_signs
from evaluation.report.view import View
from fusionroute.looks import FAINT, INK, NOBODY_COLOUR, ROUTER_COLOUR

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MOST_TOKENS = 240
MOST_CELL_INCHES, LEAST_CELL_INCHES = 1.7, 0.26
OVER_INCHES, CELL_INCHES, MARK_INCHES, WEIGHT_INCHES, GAP_INCHES = 0.2, 0.27, 0.17, 0.14, 0.16
MOST_LABEL_INCHES = 0.95
OVERRULED = "dashed, above a dark frame: what the overruled expert would have written"
GATE = "router"
"""The name of the router's own weight under a gate rule."""


@dataclass(frozen=True, slots=True)
class _Cell:
    """A token at its place in a line, in inches from the line's left."""

    token: TracedToken
    left: float
    width: float


@dataclass(frozen=True)
class _Strip:
    """What all lines of an answer have in common."""

    slots: tuple[str, ...]
    weights: tuple[str, ...]
    signs: dict[str, Sign]
    label_inches: float
    is_overruled: bool

    @property
    def line_inches(self) -> float:
        over = OVER_INCHES if self.is_overruled else 0.0
        return over + CELL_INCHES + MARK_INCHES + WEIGHT_INCHES * len(self.weights) + GAP_INCHES


def draw_strip(view: View, example: TracedAnswer) -> Sheet:
    """One example on a sheet of its own."""
    title = f"{view.label(example.system)} on {example.task}: {'right' if example.is_right else 'wrong'}"
    shown = example.tokens[:MOST_TOKENS]
    told = f"Asked: {_in_a_line(example.prompt)}"
    told += f" \N{MIDDLE DOT} gold: {_in_a_line(example.reference)}" if example.reference else ""
    left_out = len(example.tokens) - len(shown)
    told += f" ({left_out} more tokens are not drawn.)" if left_out else ""
    strip = _strip_of(view, shown)
    lines = _lines(shown, WIDTH_INCHES - 2 * MARGIN - strip.label_inches)
    signs = _legend(strip, shown)
    top = heading_inches(title, told) + 0.04
    legend_top = top + strip.line_inches * len(lines)
    sheet = Sheet(legend_top + signs_inches(signs) + MARGIN)
    sheet.heading(title, told)
    for place, line in enumerate(lines):
        start = top + place * strip.line_inches
        axes = sheet.axes(MARGIN, start, WIDTH_INCHES - 2 * MARGIN, strip.line_inches)
        axes.set_axis_off()
        axes.set(xlim=(0, WIDTH_INCHES - 2 * MARGIN), ylim=(strip.line_inches, 0))
        _draw_line(axes, strip, line)
    draw_signs(sheet, legend_top, signs)
    return sheet


def _strip_of(view: View, tokens: Sequence[TracedToken]) -> _Strip:
    given = {slot for token in tokens for slot in token.weights}
    used = (given - {GATE}) | {token.expert for token in tokens}
    slots = [*view.findings.slots, *sorted(used - set(view.findings.slots) - {""})]
    weights = [slot for slot in dict.fromkeys((*slots, GATE)) if slot in given]
    label_inches = min(max((text_inches(slot, SMALL) for slot in weights), default=0.0), MOST_LABEL_INCHES)
    return _Strip(
        slots=tuple(slot for slot in slots if slot in used),
        weights=tuple(weights),
        signs=slot_signs([*slots, ""]),
        label_inches=label_inches + (0.1 if weights else 0.0),
        is_overruled=any(token.is_overruled for token in tokens),
    )


def _lines(tokens: Sequence[TracedToken], width: float) -> list[list[_Cell]]:
    """Tokens in lines that fit."""
    lines: list[list[_Cell]] = [[]]
    left = 0.0
    for token in tokens:
        size = _cell_inches(token)
        if lines[-1] and left + size > width:
            lines.append([])
            left = 0.0
        lines[-1].append(_Cell(token, left, size))
        left += size
    return lines if lines[0] else []


def _cell_inches(token: TracedToken) -> float:
    size = text_inches(_shown(token.text), NORMAL) + 0.14
    if token.is_overruled:
        size = max(size, text_inches(_shown(token.by_expert), SMALL) + 0.14)
    return max(size, LEAST_CELL_INCHES)


def _draw_line(axes: Axes, strip: _Strip, line: Sequence[_Cell]) -> None:
    from matplotlib.patches import Rectangle

    top = OVER_INCHES if strip.is_overruled else 0.0
    for cell in line:
        left = strip.label_inches + cell.left
        _draw_token(axes, strip, cell, left, top)
        for row, slot in enumerate(strip.weights):
            weight = min(max(cell.token.weights.get(slot, 0.0), 0.0), 1.0)
            colour = ROUTER_COLOUR if slot == GATE else strip.signs[slot].edge
            place = (left + 0.015, top + CELL_INCHES + MARK_INCHES + row * WEIGHT_INCHES + 0.01)
            size = (cell.width - 0.03, WEIGHT_INCHES - 0.02)
            axes.add_artist(Rectangle(place, *size, facecolor="white", edgecolor=FAINT, linewidth=0.5))
            axes.add_artist(Rectangle(place, *size, facecolor=colour, alpha=weight, linewidth=0))
    for row, slot in enumerate(strip.weights):
        middle = top + CELL_INCHES + MARK_INCHES + (row + 0.5) * WEIGHT_INCHES
        axes.text(strip.label_inches - 0.07, middle, drawable(shortened(slot, MOST_LABEL_INCHES, SMALL)),
                  ha="right", va="center_baseline", fontsize=SMALL, color=MUTED)  # fmt: skip


def _draw_token(axes: Axes, strip: _Strip, cell: _Cell, left: float, top: float) -> None:
    from matplotlib.colors import to_rgba
    from matplotlib.patches import Rectangle

    token, middle = cell.token, left + cell.width / 2
    sign = strip.signs[token.expert]
    axes.add_artist(
        Rectangle((left + 0.015, top), cell.width - 0.03, CELL_INCHES, facecolor=to_rgba(sign.edge, 0.25),
                  edgecolor=INK if token.is_overruled else sign.edge, linewidth=1.8 if token.is_overruled else 0.9)
    )  # fmt: skip
    axes.text(middle, top + CELL_INCHES / 2, drawable(_shown(token.text)), ha="center", va="center_baseline",
              fontsize=NORMAL)  # fmt: skip
    axes.text(middle, top + CELL_INCHES + MARK_INCHES / 2, drawable(sign.letter), ha="center",
              va="center_baseline", fontsize=SMALL, fontweight="bold", color=MUTED)  # fmt: skip
    if token.is_overruled:
        text = _shown(token.by_expert)
        width = max(text_inches(text, SMALL) + 0.08, 0.16)
        axes.add_artist(Rectangle((middle - width / 2, 0.01), width, OVER_INCHES - 0.04, facecolor="white",
                                 edgecolor=INK, linewidth=0.8, linestyle=(0, (2.5, 1.8))))  # fmt: skip
        axes.text(middle, OVER_INCHES / 2 - 0.01, drawable(text), ha="center", va="center_baseline",
                  fontsize=SMALL)  # fmt: skip


def _legend(strip: _Strip, tokens: Sequence[TracedToken]) -> list[Sign]:
    is_alone = any(not token.expert for token in tokens)
    shown = [*strip.slots, *([""] if is_alone else [])]
    signs = [
        Sign(strip.signs[slot].meaning, strip.signs[slot].edge, letter=strip.signs[slot].letter)
        for slot in shown
    ]
    if strip.weights:
        signs.append(Sign("rows below: routing weights, darker for more", NOBODY_COLOUR))
    if strip.is_overruled:
        signs.append(Sign(OVERRULED, "white", dashes=True))
    if any(not token.text for token in tokens):
        signs.append(Sign("∅ a token without text", FAINT))
    return signs


def _shown(text: str) -> str:
    return shortened(visible(text), MOST_CELL_INCHES, NORMAL)


def _in_a_line(text: str) -> str:
    return " ↵ ".join(text.splitlines())
