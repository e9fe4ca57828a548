"""Who took part, how undecided the routing was, and where the complement overruled the expert."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from evaluation.findings import ALL, Overruling, RoutingEntropy, RoutingShare
from evaluation.report.paper import MUTED, SERVED_COLOUR, SMALL, Sheet, drawable
from evaluation.report.rows import Head, Plan, RowPage, settle
from evaluation.report.signs import Sign, letter_ground, slot_signs
from evaluation.report.view import Columns, View, part_of
from fusionroute.looks import INK

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MOST_SYSTEMS = 4
"""Systems side by side where parts go down the page."""
LEAST_SHARE_WITH_LETTER = 0.09
MENDED = Sign("the complement was right, the expert not", SERVED_COLOUR)
SPOILED = Sign("the expert was right, the complement not", "#D98032", hatch="////")
NEITHER = Sign("neither was right", "#8C949E", hatch="....")
UNKNOWN = Sign("not known what was right", "#C9CFD6")


@dataclass(frozen=True, slots=True)
class _Grid:
    """Rows and columns of (system, stratum), each with a name."""

    rows: Sequence[str]
    heads: Sequence[str]
    keys: Sequence[Sequence[tuple[str, str]]]
    by: str


def draw_shares(view: View, columns: Columns) -> list[Sheet]:
    """The share of the tokens that each expert took part in."""
    shares = {(each.system, each.stratum): each for each in view.findings.routing}
    used = {slot for each in shares.values() for slot, share in each.shares.items() if share > 0}
    slots = [
        *view.findings.slots,
        *sorted(used - set(view.findings.slots) - {""}),
        *([""] if "" in used else []),
    ]
    signs = slot_signs(slots)

    def draw(axes: Axes, row: int, share: RoutingShare) -> None:
        _draw_stack(axes, row, [(share.shares.get(slot, 0.0), signs[slot]) for slot in slots])

    sheets = []
    for grid in _grids(view, columns, list(shares)):
        title = f"Who took part{grid.by}"
        told = "Share of the tokens in which each expert took part."
        page = _page(grid, title, told, list(signs.values()))
        _fill(page, grid, shares, draw)
        for axes in page.columns:
            settle(axes, 0.0, 1.0, lambda tick: f"{tick:g}")
        sheets.append(page.sheet)
    return sheets


def draw_overruled(view: View, columns: Columns) -> list[Sheet]:
    """The share of the tokens in which the fused first choice was another than the expert's, and who was right."""
    found = {(each.system, each.stratum): each for each in view.findings.overrulings if each.num_tokens}
    parts = {key: _overruled_parts(each) for key, each in found.items()}
    signs = [sign for sign in (MENDED, SPOILED, NEITHER, UNKNOWN)
             if any(share > 0 for each in parts.values() for share, known in each if known is sign)]  # fmt: skip
    sheets = []
    for grid in _grids(view, columns, list(found)):
        title = f"Where the complement overruled the expert{grid.by}"
        told = "Share of an expert's tokens in which the router's logits made another token the first choice."
        page = _page(grid, title, told, signs, right_inches=0.45)
        most = max(each.num_overruled / each.num_tokens for each in found.values()) or 1.0

        def draw(axes: Axes, row: int, each: Overruling) -> None:
            _draw_stack(axes, row, _overruled_parts(each))
            _write(axes, row, f"{100 * each.num_overruled / each.num_tokens:.1f} %")

        _fill(page, grid, found, draw)
        for axes in page.columns:
            settle(axes, 0.0, 1.02 * most, lambda tick: f"{100 * tick:.4g} %")
        sheets.append(page.sheet)
    return sheets


def draw_entropy(view: View, columns: Columns) -> list[Sheet]:
    """How the entropy of the routing weights is spread over tokens."""
    found = {
        (each.system, each.stratum): each
        for each in view.findings.entropies
        if sum(each.counts) and each.most > 0
    }
    most = max((each.most for each in found.values()), default=1.0)
    sheets = []
    for grid in _grids(view, columns, list(found)):
        told = (
            "Entropy of the routing weights in nats, from decided (0) to undecided; height: tokens. "
            "Line and number: mean."
        )
        page = _page(
            grid, f"How undecided the routing was{grid.by}", told, [], right_inches=0.4, row_inches=0.46
        )

        def draw(axes: Axes, row: int, each: RoutingEntropy) -> None:
            _draw_histogram(axes, row, each)
            _write(axes, row, f"{each.mean:.2f}")

        _fill(page, grid, found, draw)
        for axes in page.columns:
            settle(axes, 0.0, most, lambda tick: f"{tick:g}")
        sheets.append(page.sheet)
    return sheets


def _grids(view: View, columns: Columns, known: Sequence[tuple[str, str]]) -> list[_Grid]:
    """Systems down the page and strata beside each other, or, for many strata, the other way round."""
    strata = [stratum for stratum in columns.strata if any(each == stratum for _, each in known)]
    order = {note.name: place for place, note in enumerate(view.findings.systems)}
    systems = sorted(
        {name for name, each in known if each in strata}, key=lambda name: order.get(name, len(order))
    )
    by = f", by {columns.name}" if set(strata) - {ALL} and columns.name else ""
    labels = [view.label(name) for name in systems]
    parts = [part_of(stratum) for stratum in strata]
    if not systems:
        return []
    if columns in view.narrow:
        return [_Grid(labels, parts, [[(name, stratum) for stratum in strata] for name in systems], by)]
    return [
        _Grid(parts, labels[start : start + MOST_SYSTEMS],
              [[(name, stratum) for name in systems[start : start + MOST_SYSTEMS]] for stratum in strata], by)
        for start in range(0, len(systems), MOST_SYSTEMS)
    ]  # fmt: skip


def _page(
    grid: _Grid,
    title: str,
    told: str,
    signs: Sequence[Sign],
    right_inches: float = 0.0,
    row_inches: float = 0.27,
) -> RowPage:
    return RowPage(
        Plan(title, told, grid.rows, [Head(head) for head in grid.heads],
             right_inches=right_inches, row_inches=row_inches, signs=signs)
    )  # fmt: skip


def _fill(
    page: RowPage, grid: _Grid, found: Mapping[tuple[str, str], Any], draw: Callable[[Axes, int, Any], None]
) -> None:
    for row, keys in enumerate(grid.keys):
        for axes, key in zip(page.columns, keys, strict=True):
            if key in found:
                draw(axes, row, found[key])


def _overruled_parts(each: Overruling) -> list[tuple[float, Sign]]:
    counts = (each.num_mended, each.num_spoiled, each.num_neither, each.num_unknown)
    signs = (MENDED, SPOILED, NEITHER, UNKNOWN)
    return [(count / each.num_tokens, sign) for count, sign in zip(counts, signs, strict=True)]


def _draw_stack(axes: Axes, row: int, parts: Sequence[tuple[float, Sign]]) -> None:
    left = 0.0
    for share, sign in parts:
        if share <= 0:
            continue
        axes.barh(row, share, left=left, height=0.66, color=sign.edge, edgecolor="white", hatch=sign.hatch,
                  linewidth=0.4, zorder=2)  # fmt: skip
        if sign.letter and share >= LEAST_SHARE_WITH_LETTER:
            axes.text(left + share / 2, row, drawable(sign.letter), ha="center", va="center_baseline",
                      fontsize=SMALL, fontweight="bold", color=INK, bbox=letter_ground(), zorder=3)  # fmt: skip
        left += share


def _draw_histogram(axes: Axes, row: int, each: RoutingEntropy) -> None:
    height, width = 0.8 / max(each.counts), each.most / len(each.counts)
    for place, count in enumerate(each.counts):
        if count:
            axes.bar((place + 0.5) * width, -count * height, width * 0.92, bottom=row + 0.42,
                     color=SERVED_COLOUR, alpha=0.75, linewidth=0, zorder=2)  # fmt: skip
    axes.plot([each.mean, each.mean], [row - 0.42, row + 0.42], color="#A6480B", linewidth=1.3, zorder=3)
    axes.plot([each.most, each.most], [row - 0.42, row + 0.42], color=MUTED, linewidth=0.8, linestyle=":",
              clip_on=False, zorder=3)  # fmt: skip


def _write(axes: Axes, row: int, number: str) -> None:
    axes.annotate(number, (1.0, row), xycoords=("axes fraction", "data"), xytext=(7, 0),
                  textcoords="offset points", va="center", fontsize=SMALL)  # fmt: skip
