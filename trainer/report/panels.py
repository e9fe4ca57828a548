"""The panels of the report over the steps of a run. Each draws itself on one pair of axes from the run's records."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fusionroute.looks import INK, slot_colours
from trainer.report.records import SHARE_PREFIX, RunRecords, Series
from trainer.report.style import CHOSEN_COLOUR, LOSSES, REJECTED_COLOUR, Line, label_at_right

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MANY_POINTS = 24
SMOOTHING_SHARE = 0.04


@dataclass(frozen=True, slots=True)
class Panel:
    """One part of the page.

    Attributes:
        has_data: whether there is anything to show.
        draw: draws it; called only then.
    """

    title: str
    has_data: Callable[[RunRecords], bool]
    draw: Callable[[Axes, RunRecords], None]


def _losses(axes: Axes, records: RunRecords) -> None:
    lines = [line for line in LOSSES if records.series(line.name)]
    if len(lines) == 2:  # the total and its only part
        lines = lines[:1]
    _draw_lines(axes, records, lines)
    values = [value for line in lines for value in records.series(line.name).values]
    if min(values) > 0 and max(values) > 20 * min(values):
        axes.set_yscale("log")
    axes.set_ylabel("nats")
    _label_lines(axes, records, lines)


def _shares(axes: Axes, records: RunRecords) -> None:
    colours = slot_colours(records.slots)
    series = {slot: records.series(SHARE_PREFIX + slot) for slot in records.slots}
    series = {slot: each for slot, each in series.items() if each}
    steps = sorted(set.intersection(*(set(each.steps) for each in series.values())))
    stacks = [_curve(_at(each, steps)) for each in series.values()]
    if len(steps) == 1:
        steps, stacks = [0.0, steps[0]], [[stack[0]] * 2 for stack in stacks]
    axes.stackplot(steps, stacks, colors=[colours[slot] for slot in series], alpha=0.85, linewidth=0)
    axes.set(ylim=(0, 1), ylabel="share of targets", xlim=(steps[0], steps[-1]))
    base, labels = 0.0, []
    for slot, stack in zip(series, stacks, strict=True):
        labels.append((base + stack[-1] / 2, slot, colours[slot]))
        base += stack[-1]
    label_at_right(axes, labels)


def _entropy(axes: Axes, records: RunRecords) -> None:
    line = Line("routing_entropy", "", INK)
    _draw_lines(axes, records, [line])
    values = records.series(line.name).values
    axes.set_ylabel("nats")
    axes.set_ylim(0, max(values) * 1.15 or 1.0)
    if (num_experts := len(records.slots)) > 1:
        most = math.log(num_experts)
        axes.axhline(most, color=INK, linewidth=0.8, linestyle=":")
        axes.set_ylim(0, most * 1.15)
        axes.annotate(f"ln {num_experts}", (1, most), xycoords=("axes fraction", "data"), xytext=(4, 0),
                      textcoords="offset points", va="center", fontsize=7.5)  # fmt: skip


def _flips(axes: Axes, records: RunRecords) -> None:
    line = Line("flip_rate", "", INK)
    _draw_lines(axes, records, [line])
    axes.set_ylim(0, max(0.05, 1.15 * max(records.series(line.name).values)))
    axes.set_ylabel("share of targets of pairs")


def _logratios(axes: Axes, records: RunRecords) -> None:
    axes.axhline(0, color=INK, linewidth=0.8)
    _draw_responses(axes, records, "logratio", "nats, router over reference")


def _rewards(axes: Axes, records: RunRecords) -> None:
    axes.axhline(0, color=INK, linewidth=0.8)
    lines = [Line("rewards/margins", "margin", INK), Line("bias/mean", "bias", "#7D5BA6", "--")]
    lines = [line for line in lines if records.series(line.name)]
    mean, std = records.series("bias/mean"), records.series("bias/std")
    if std and std.steps == mean.steps:
        low = [value - spread for value, spread in zip(mean.values, std.values, strict=True)]
        high = [value + spread for value, spread in zip(mean.values, std.values, strict=True)]
        axes.fill_between(mean.steps, low, high, color="#7D5BA6", alpha=0.13, linewidth=0)
    _draw_lines(axes, records, lines)
    axes.set_ylabel("margin (band: bias ± std)")
    _label_lines(axes, records, lines)


def _sigmoid(axes: Axes, records: RunRecords) -> None:
    lines = [
        Line("sigmoid_neg_margin", "σ(−margin)", INK),
        Line("rewards/accuracies", "accuracy", "#5B7083", "--"),
    ]
    lines = [line for line in lines if records.series(line.name)]
    axes.axhline(0.5, color=INK, linewidth=0.8, linestyle=":")
    _draw_lines(axes, records, lines)
    axes.set(ylim=(0, 1), ylabel="mean over pairs")
    _label_lines(axes, records, lines)


def _lengths(axes: Axes, records: RunRecords) -> None:
    most = max(value for side in ("chosen", "rejected") for value in records.series(f"length/{side}").values)
    axes.set_ylim(0, 1.15 * most)
    _draw_responses(axes, records, "length", "targets of a response")


def _optimiser(axes: Axes, records: RunRecords) -> None:
    _draw_lines(axes, records, [Line("gradient_norm", "", "#5B7083")])
    axes.set_ylim(bottom=0)
    axes.set_ylabel("gradient norm")
    rate = records.series("learning_rate")
    if rate:
        other = axes.twinx()
        other.plot(rate.steps, rate.values, color=INK, linestyle="--", linewidth=1.1)
        other.set_ylim(bottom=0)
        other.set_ylabel("learning rate (dashed)")
        other.grid(visible=False)
        other.spines["right"].set_visible(True)
        other.ticklabel_format(style="sci", axis="y", scilimits=(0, 0), useMathText=True)
        other.yaxis.get_offset_text().set_fontsize(7.0)


def _speed(axes: Axes, records: RunRecords) -> None:
    _draw_lines(axes, records, [Line("tokens_per_second", "", "#5B7083")])
    axes.set_ylim(0, 1.15 * max(records.series("tokens_per_second").values))
    axes.set_ylabel("tokens per second")
    axes.yaxis.set_major_formatter("{x:,.0f}")


SFT_PANELS: tuple[Panel, ...] = (
    Panel("Losses", lambda records: records.has(*(line.name for line in LOSSES)), _losses),
    Panel(
        "Expert shares",
        lambda records: records.has(*(SHARE_PREFIX + slot for slot in records.slots)),
        _shares,
    ),
    Panel("Routing entropy", lambda records: records.has("routing_entropy"), _entropy),
)
PAIR_PANELS: tuple[Panel, ...] = (
    Panel(
        "Log-ratios, apart", lambda records: records.has("logratio/chosen", "logratio/rejected"), _logratios
    ),
    Panel("Margin and bias", lambda records: records.has("rewards/margins", "bias/mean"), _rewards),
    Panel("Gradient scale and accuracy", lambda records: records.has("sigmoid_neg_margin"), _sigmoid),
    Panel("Routes changed since phase I", lambda records: records.has("flip_rate"), _flips),
    Panel("Response lengths", lambda records: records.has("length/chosen", "length/rejected"), _lengths),
)
LOOP_PANELS: tuple[Panel, ...] = (
    Panel("Optimiser", lambda records: records.has("gradient_norm"), _optimiser),
    Panel("Speed", lambda records: records.has("tokens_per_second"), _speed),
)


def smoothed(values: Sequence[float]) -> list[float]:
    """Each value's mean with its neighbours, weighted by a bell; at the ends only over those that exist."""
    import numpy as np

    bell_width = max(1.0, SMOOTHING_SHARE * len(values) / 2)
    reach = min(math.ceil(2.5 * bell_width), (len(values) - 1) // 2)
    bell = np.exp(-0.5 * (np.arange(-reach, reach + 1) / bell_width) ** 2)
    weights = np.convolve(np.ones(len(values)), bell, mode="same")
    return [float(value) for value in np.convolve(values, bell, mode="same") / weights]


def _draw_lines(axes: Axes, records: RunRecords, lines: Sequence[Line]) -> None:
    """Each line as it was logged where there are few points, else its mean over it, which is what is read."""
    last = 0.0
    for line in lines:
        series = records.series(line.name)
        last = max(last, series.steps[-1])
        if len(series.steps) <= MANY_POINTS:
            axes.plot(series.steps, series.values, line.dashes, color=line.colour, marker="o", markersize=2.5,
                      clip_on=False)  # fmt: skip
            continue
        axes.plot(series.steps, series.values, color=line.colour, linewidth=0.6, alpha=0.28)
        axes.plot(series.steps, _curve(series.values), line.dashes, color=line.colour)
    axes.set_xlim(0, last or 1.0)


def _draw_responses(axes: Axes, records: RunRecords, prefix: str, unit: str) -> None:
    lines = [
        Line(f"{prefix}/chosen", "chosen", CHOSEN_COLOUR),
        Line(f"{prefix}/rejected", "rejected", REJECTED_COLOUR, "--"),
    ]
    lines = [line for line in lines if records.series(line.name)]
    _draw_lines(axes, records, lines)
    axes.set_ylabel(unit)
    _label_lines(axes, records, lines)


def _label_lines(axes: Axes, records: RunRecords, lines: Sequence[Line]) -> None:
    if len(lines) < 2:
        return
    ends = [_curve(records.series(line.name).values)[-1] for line in lines]
    axes.set_ylim(axes.get_ylim())  # settled from here on
    label_at_right(axes, [(end, line.label, line.colour) for end, line in zip(ends, lines, strict=True)])


def _curve(values: list[float]) -> list[float]:
    return smoothed(values) if len(values) > MANY_POINTS else values


def _at(series: Series, steps: Sequence[float]) -> list[float]:
    known = dict(zip(series.steps, series.values, strict=True))
    return [known[step] for step in steps]
