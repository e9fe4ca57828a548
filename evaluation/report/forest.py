"""How systems did, and how they differ from one of them: a point with its interval for each, strata side by side."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from evaluation.findings import SCORE, Comparison
from evaluation.report.paper import MUTED, SERVED_COLOUR, SMALL, Sheet, signed
from evaluation.report.rows import Head, Plan, RowPage, settle
from evaluation.report.signs import Sign
from evaluation.report.view import Columns, View, numbered, part_of
from evaluation.statistics.intervals import Estimate
from fusionroute.looks import INK

if TYPE_CHECKING:
    from matplotlib.axes import Axes

KINDS = {
    "served": ("o", SERVED_COLOUR, "served by the router"),
    "expert": ("s", INK, "expert alone"),
    "selection": ("^", INK, "one expert for each answer"),
    "model": ("D", INK, "single model"),
    "remote": ("P", INK, "remote"),
    "forced": ("X", MUTED, "given gold prefixes: not comparable"),
}
"""Marker, colour and meaning of each kind of system."""
OTHER_KIND = ("o", INK, "other")
BETTER_COLOUR, WORSE_COLOUR = SERVED_COLOUR, "#A6480B"
SEED_COLOUR = "#7C8794"
SIGNIFICANCE = (
    Sign("better, significant at 5 % after Holm", BETTER_COLOUR, marker="o"),
    Sign("worse, significant at 5 % after Holm", WORSE_COLOUR, marker="o"),
    Sign("no difference shown", MUTED, face="white", marker="o"),
)
SEED_HEIGHT = 0.27
"""How far above its interval a seed's dot lies, in rows."""
LEAST_ROOM = 0.1
"""Beside numbers that are all the same, where the axes are made for the numbers alone."""


def draw_forest(view: View, columns: Columns) -> Sheet:
    """Mean and interval of every system in each stratum of a division."""
    several = len(view.seeds) > 1
    signs = _kind_signs({note.kind for note in view.systems})
    told = f"{view.look.told} with its 95 % interval; " + (
        f"small dots: each of {len(view.seeds)} training seeds." if several else f"{view.look.better}."
    )
    page = RowPage(
        Plan(
            title=f"{view.look.heading}{_by(columns)}",
            told=told,
            labels=[note.label for note in view.systems],
            heads=[
                Head(part_of(stratum), _amount(view, view.num_questions(stratum), several))
                for stratum in columns.strata
            ],
            bold=frozenset(row for row, note in enumerate(view.systems) if note.name == view.baseline),
            signs=signs,
            right_inches=0.42 if view.look.least else 0.5,  # losses may have more digits
        )
    )
    cells = [[view.cell(note.name, stratum) for note in view.systems] for stratum in columns.strata]
    low, high = _limits(
        (
            value
            for column in cells
            for cell in column
            if cell
            for value in _reach(cell.estimate, cell.per_seed)
        ),
        least=view.look.least,
    )
    for axes, column in zip(page.columns, cells, strict=True):
        for row, (note, cell) in enumerate(zip(view.systems, column, strict=True)):
            if cell is None:
                continue
            marker, colour, _ = KINDS.get(note.kind, OTHER_KIND)
            _draw_interval(axes, row, cell.estimate, cell.per_seed, colour)
            axes.plot(
                [cell.estimate.value], [row], marker, color=colour, markersize=5, clip_on=False, zorder=4
            )
            _write_number(axes, row, f"{cell.estimate.value:.3f}")
        settle(axes, low, high, _tick_label)
    return page.sheet


def draw_differences(view: View, columns: Columns) -> Sheet | None:
    """Every system minus the baseline; None where nothing is compared with it in these strata."""
    others = [
        note.name
        for note in view.systems
        if any(view.comparison(note.name, view.baseline, stratum) for stratum in columns.strata)
    ]
    if not others:
        return None
    rows = [(name, view.baseline) for name in others]
    title = f"{_difference(view)} to {view.label(view.baseline)}{_by(columns)}"
    return _draw_pairs(view, columns, rows, title, [view.label(name) for name in others])


def draw_pairs(view: View, columns: Columns) -> Sheet | None:
    """The comparisons that the baseline has no part in; None where there are none in these strata."""
    pairs = dict.fromkeys(
        (each.first, each.second)
        for each in view.findings.comparisons
        if each.stratum in columns.strata and view.baseline not in (each.first, each.second)
    )
    if not pairs:
        return None
    labels = [f"{view.label(first)} {signed(-1)[0]} {view.label(second)}" for first, second in pairs]
    return _draw_pairs(
        view, columns, list(pairs), f"Other {_difference(view).lower()}s{_by(columns)}", labels
    )


def _draw_pairs(
    view: View, columns: Columns, pairs: Sequence[tuple[str, str]], title: str, labels: Sequence[str]
) -> Sheet:
    found = [[view.comparison(*pair, stratum) for pair in pairs] for stratum in columns.strata]
    several = any(len(each.per_seed) > 1 for column in found for each in column if each)
    told = f"On the same {view.look.things}, with the 95 % interval of the paired bootstrap; "
    told += f"{'left' if view.look.is_less_better else 'right'} of zero is better."
    told += " Small dots: each training seed." if several else ""
    numbers = [numbered({each.num_questions for each in column if each}) for column in found]
    heads = [
        Head(part_of(stratum), _amount(view, number, several) if number else "")
        for stratum, number in zip(columns.strata, numbers, strict=True)
    ]
    page = RowPage(Plan(title, told, labels, heads, signs=SIGNIFICANCE, right_inches=0.5))
    low, high = _limits(
        (
            value
            for column in found
            for each in column
            if each
            for value in _reach(each.difference, each.per_seed)
        ),
        least=(-0.02, 0.02),
    )
    for axes, column in zip(page.columns, found, strict=True):
        axes.axvline(0, color=INK, linewidth=0.9, zorder=1)
        for row, each in enumerate(column):
            if each is not None:
                _draw_difference(axes, row, each, is_better=view.look.is_better(each.difference.value))
        settle(axes, low, high, _tick_label)
    return page.sheet


def _draw_difference(axes: Axes, row: int, comparison: Comparison, *, is_better: bool) -> None:
    value = comparison.difference.value
    colour = MUTED if not comparison.is_significant else BETTER_COLOUR if is_better else WORSE_COLOUR
    _draw_interval(axes, row, comparison.difference, comparison.per_seed, colour)
    face = colour if comparison.is_significant else "white"
    axes.plot([value], [row], "o", color=colour, markerfacecolor=face, markeredgewidth=1.3, markersize=5.5,
              clip_on=False, zorder=4)  # fmt: skip
    _write_number(axes, row, signed(value), weight="bold" if comparison.is_significant else "normal")


def _draw_interval(
    axes: Axes, row: int, estimate: Estimate, per_seed: Mapping[int, float], colour: str
) -> None:
    axes.plot([estimate.low, estimate.high], [row, row], color=colour, linewidth=1.6, solid_capstyle="butt",
              clip_on=False, zorder=3)  # fmt: skip
    for end in (estimate.low, estimate.high):
        axes.plot([end, end], [row - 0.13, row + 0.13], color=colour, linewidth=1.0, clip_on=False, zorder=3)
    if len(per_seed) > 1:
        values = [per_seed[seed] for seed in sorted(per_seed)]
        axes.plot(values, [row - SEED_HEIGHT] * len(values), "o", color=SEED_COLOUR, markersize=2.2,
                  markeredgewidth=0, clip_on=False, zorder=2)  # fmt: skip


def _write_number(axes: Axes, row: int, number: str, weight: str = "normal") -> None:
    axes.annotate(number, (1.0, row), xycoords=("axes fraction", "data"), xytext=(7, 0),
                  textcoords="offset points", va="center", fontsize=SMALL, fontweight=weight)  # fmt: skip


def _tick_label(tick: float) -> str:
    return signed(tick, 6).lstrip("+").rstrip("0").rstrip(".")


def _limits(values: Iterable[float], least: tuple[float, float] | None) -> tuple[float, float]:
    """Of axes that hold all values, and `least` if there is one, with some room beyond what lies outside of it."""
    known = [value for value in values if math.isfinite(value)]
    if least is None:
        low, high = min(known, default=0.0), max(known, default=1.0)
        room = 0.04 * (high - low) or LEAST_ROOM
        return low - room, high + room
    low, high = min([*known, least[0]]), max([*known, least[1]])
    room = 0.04 * (high - low)
    return (low - room if low < least[0] else low), (high + room if high > least[1] else high)


def _amount(view: View, number: str, several: bool) -> str:
    is_score = view.look.measure == SCORE
    return (f"n = {number}" if is_score else f"{number} {view.look.things}") + (" a seed" if several else "")


def _difference(view: View) -> str:
    """What a difference is of; nothing is said of scores."""
    return "Difference" if view.look.measure == SCORE else f"{view.look.parts} difference"


def _reach(estimate: Estimate, per_seed: Mapping[int, float]) -> tuple[float, ...]:
    return (estimate.value, estimate.low, estimate.high, *per_seed.values())


def _by(columns: Columns) -> str:
    return f", by {columns.name}" if columns.name else ""


def _kind_signs(kinds: Collection[str]) -> list[Sign]:
    looks = [look for kind, look in KINDS.items() if kind in kinds]
    looks += [OTHER_KIND] if set(kinds) - set(KINDS) else []
    return [Sign(meaning, colour, marker=marker) for marker, colour, meaning in looks]
