"""The panels of the report that stand still: what was measured once, before or after training."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, Any

from fusionroute.looks import FAINT, INK, NOBODY_COLOUR, ROUTER_COLOUR, slot_colours
from trainer.report.panels import Panel
from trainer.report.records import RunRecords

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import SubFigure

NOBODY = "nobody"
MINUS = "\N{MINUS SIGN}"


def _bias(axes: Axes, records: RunRecords) -> None:
    assert records.bias is not None
    histogram, mean = records.bias["bias_histogram"], records.bias["mean"]
    _bars(axes, histogram, "#7D5BA6")
    axes.axvline(0, color=INK, linewidth=0.8)
    axes.axvline(mean, color=INK, linewidth=1.2, linestyle="--")
    _remark(axes, histogram["counts"], f"mean {mean:+.2f}\nstd {records.bias['std']:.2f}")
    axes.set(xlabel=f"bias (beta {records.bias['beta']:g})", ylabel="pairs")


def _sigmoid(axes: Axes, records: RunRecords) -> None:
    assert records.bias is not None
    histogram = records.bias["sigmoid_histogram"]
    _bars(axes, histogram, "#5B7083")
    axes.axvline(0.5, color=INK, linewidth=0.8, linestyle=":")
    mean = records.bias["mean_sigmoid_neg_margin"]
    axes.axvline(mean, color=INK, linewidth=1.2, linestyle="--")
    _remark(axes, histogram["counts"], f"mean {mean:.2f}\n{records.bias['weak_share']:.0%} below 0.1")
    axes.set(xlabel="σ(−margin) at step 0", ylabel="pairs", xlim=(0, 1))


BIAS_PANELS: tuple[Panel, ...] = (
    Panel("Bias before training", lambda records: records.bias is not None, _bias),
    Panel("Gradient scale before training", lambda records: records.bias is not None, _sigmoid),
)


def draw_ownership(part: SubFigure, records: RunRecords) -> None:
    """Who was right, by token owner: numbers, whom the router selected, and the share right of each."""
    assert records.ownership is not None
    rows = [row for row in records.ownership["owners"] if row["num_targets"] > 0]
    colours = slot_colours(records.slots) | {NOBODY: NOBODY_COLOUR}
    part.suptitle("Who was right, by token owner", x=0.008, ha="left", fontsize=9, fontweight="bold")
    grid = part.add_gridspec(1, 3, width_ratios=(1.25, 1.1, 1.3), wspace=0.05)
    numbers, selected, right = (part.add_subplot(grid[0, column]) for column in range(3))
    for axes in (numbers, selected, right):
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.tick_params(axis="y", length=0, labelleft=False)
    _draw_numbers(numbers, rows, colours)
    _draw_selected(selected, rows, colours, list(records.ownership["slots"]))
    _draw_right(right, rows)


def _draw_numbers(axes: Axes, rows: list[dict[str, Any]], colours: dict[str, str]) -> None:
    axes.set_axis_off()
    axes.set_xlim(0, 1)
    columns = ((0.0, "owner", "left"), (0.47, "targets", "right"), (0.7, "log p\nrouter", "right"),
               (0.95, "log p\nexpert", "right"))  # fmt: skip
    for x, heading, side in columns:
        axes.annotate(heading, (x, 1.0), xycoords="axes fraction", va="bottom", ha=side, fontsize=7.5)
    for y, row in enumerate(rows):
        cells = (
            row["owner"],
            f"{row['num_targets']:,}",
            f"{row['router_logprob']:z.2f}".replace("-", MINUS),
            f"{row['expert_logprob']:z.2f}".replace("-", MINUS),
        )
        for (x, _, side), cell in zip(columns, cells, strict=True):
            weight, colour = ("bold", colours[row["owner"]]) if x == 0.0 else ("normal", INK)
            axes.text(x, y, cell, va="center", ha=side, color=colour, fontweight=weight, fontsize=8.5)


def _draw_selected(axes: Axes, rows: list[dict[str, Any]], colours: dict[str, str], slots: list[str]) -> None:
    for y, row in enumerate(rows):
        left = 0.0
        for slot in slots:
            share = row["selected"][slot]
            axes.barh(y, share, left=left, height=0.6, color=colours[slot], alpha=0.9)
            if share >= 0.12:
                axes.text(left + share / 2, y, f"{slot} {share:.2f}" if share > 0.3 else f"{share:.2f}",
                          va="center", ha="center", fontsize=7.0, color="white", fontweight="bold")  # fmt: skip
            left += share
    axes.set(xlim=(0, 1), xlabel="share of each expert selected")
    axes.grid(visible=False)


def _draw_right(axes: Axes, rows: list[dict[str, Any]]) -> None:
    kinds = (
        ("router_right", "router alone", "s", ROUTER_COLOUR, "white", -0.2),
        ("expert_right", "chosen expert", "D", INK, "white", 0.0),
        ("sum_right", "sum", "o", INK, INK, 0.2),
    )
    for y in range(len(rows)):
        axes.axhspan(y - 0.38, y + 0.38, color=FAINT, alpha=0.45, linewidth=0, zorder=0)
    for key, label, marker, edge, face, offset in kinds:  # side by side, since many are at 1
        shares, heights = [row[key] for row in rows], [y + offset for y in range(len(rows))]
        axes.scatter(shares, heights, s=26, marker=marker, facecolors=face, edgecolors=edge, linewidths=1.3,
                     label=label, clip_on=False, zorder=3)  # fmt: skip
    axes.set(xlim=(0, 1.0), xlabel="share of targets right")
    axes.legend(
        loc="lower left", bbox_to_anchor=(0, 1.0), ncol=3, handletextpad=0.2, columnspacing=1.2, borderpad=0
    )


def _bars(axes: Axes, histogram: dict[str, list[float]], colour: str) -> None:
    edges = histogram["edges"]
    widths = [high - low for low, high in pairwise(edges)]
    axes.bar(edges[:-1], histogram["counts"], widths, align="edge", color=colour, alpha=0.75,
             edgecolor="white", linewidth=0.4)  # fmt: skip
    axes.set_xlim(edges[0], edges[-1])
    axes.grid(visible=False, axis="x")


def _remark(axes: Axes, counts: list[float], text: str) -> None:
    """In the upper corner with the lower bars."""
    third = max(1, len(counts) // 3)
    at_right = max(counts[-third:]) <= max(counts[:third])
    axes.text(0.98 if at_right else 0.02, 0.97, text.replace("-", MINUS), transform=axes.transAxes, va="top",
              ha="right" if at_right else "left", fontsize=7.5, linespacing=1.3,
              bbox={"facecolor": "white", "alpha": 0.85, "linewidth": 0, "pad": 1.5}, zorder=5)  # fmt: skip
