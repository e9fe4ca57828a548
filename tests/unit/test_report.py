"""The picture of a run: what is on it, and that nothing stands on top of something else."""

from __future__ import annotations

import json
import math
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text

from fusionroute.errors import Reason, TrainingFailed
from fusionroute.looks import SLOT_COLOURS, slot_colours
from trainer.pair_bias import BiasStatistics
from trainer.report import write_report
from trainer.report.page import draw_page, panels_of
from trainer.report.panels import smoothed
from trainer.report.records import RunRecords
from trainer.report.style import spread

SLOTS = ("math", "strings", "format")
PAIR_METRICS = (
    *(f"{name}/{side}" for name in ("logratio", "length") for side in ("chosen", "rejected")),
    *("rewards/margins", "rewards/accuracies", "bias/mean", "bias/std", "sigmoid_neg_margin", "flip_rate"),
)


def lines(num_steps: int, *, pairs: bool, slots: tuple[str, ...] = SLOTS) -> list[dict[str, Any]]:
    draw = np.random.default_rng(0)
    made = []
    for step in range(1, num_steps + 1):
        shares = draw.dirichlet([20.0] * len(slots))
        line: dict[str, Any] = {"step": step, "loss": 2 / step, "loss/lm": 1 / step, "loss/expert": 3 / step}
        line |= {f"expert_share/{slot}": share for slot, share in zip(slots, shares, strict=True)}
        line |= {
            "routing_entropy": 0.4,
            "gradient_norm": 1.0,
            "learning_rate": 1e-4,
            "tokens_per_second": 9e3,
        }
        if pairs:
            line |= {name: float(draw.uniform(0, 1)) for name in PAIR_METRICS} | {"loss/cdpo": 0.6 / step}
        made.append(line)
    return made


def ownership(slots: tuple[str, ...] = SLOTS) -> dict[str, Any]:
    rows = [
        {
            "owner": owner,
            "num_targets": 1200,
            "shared": 0.1,
            "selected": {slot: 1 / len(slots) for slot in slots},
            **dict.fromkeys(("router_right", "expert_right", "sum_right"), 1.0),
            **dict.fromkeys(("router_logprob", "expert_logprob", "sum_logprob"), -0.25),
        }
        for owner in (*slots, "nobody")
    ]
    return {"slots": list(slots), "num_rows": 9, "owners": rows}


def write_run(folder: Path, metrics: list[dict[str, Any]], **files: Any) -> Path:
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in metrics))
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def bias(mean: float = -0.6) -> dict[str, Any]:
    draw = np.random.default_rng(0).normal(mean, 1.2, 500)
    return BiasStatistics(draw.astype(np.float32), 0.1).to_json()


def titles(folder: Path) -> list[str]:
    return [panel.title for panel in panels_of(RunRecords.read(folder))]


def test_a_run_without_pairs_has_only_the_panels_it_has_data_for(tmp_path: Path):
    assert titles(write_run(tmp_path, lines(5, pairs=False))) == [
        "Losses",
        "Expert shares",
        "Routing entropy",
        "Optimiser",
        "Speed",
    ]


def test_a_run_with_pairs_shows_log_ratios_apart_lengths_flips_bias_and_gradient_scale(tmp_path: Path):
    shown = titles(write_run(tmp_path, lines(5, pairs=True), bias=bias()))
    assert {
        "Log-ratios, apart",
        "Margin and bias",
        "Gradient scale and accuracy",
        "Routes changed since phase I",
        "Response lengths",
        "Bias before training",
        "Gradient scale before training",
    } <= set(shown)


CASES: dict[str, tuple[list[dict[str, Any]], dict[str, Any]]] = {
    "everything": (lines(60, pairs=True), {"bias": bias(), "ownership": ownership()}),
    "phase one": (lines(60, pairs=False), {"ownership": ownership()}),
    "one step": (lines(1, pairs=True), {"bias": bias(3.0)}),
    "one expert": (lines(9, pairs=True, slots=("only",)), {"ownership": ownership(("only",))}),
    "eight experts": (
        lines(40, pairs=False, slots=tuple(f"domain-{n}" for n in range(8))),
        {"ownership": ownership(tuple(f"domain-{n}" for n in range(8)))},
    ),
    "pairs alone": ([], {"bias": bias()}),
}


@pytest.mark.parametrize("case", CASES)
def test_no_words_stand_on_others_or_leave_the_page(case: str, tmp_path: Path):
    metrics, files = CASES[case]
    figure = draw_page(RunRecords.read(write_run(tmp_path, metrics, **files)), "a run of some name")
    assert overlaps(figure) == []


def overlaps(figure: Figure) -> list[str]:
    """Pairs of words that touch, and words beyond the page."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    renderer = canvas.get_renderer()
    page = figure.bbox
    words = [text for text in figure.findobj(Text) if text.get_visible() and text.get_text().strip()]
    ticks = {id(label) for label in hidden_ticks(figure)}
    boxes = [(text.get_text(), text.get_window_extent(renderer)) for text in words if id(text) not in ticks]
    assert boxes
    outside = [
        text for text, box in boxes
        if box.x0 < page.x0 - 1 or box.x1 > page.x1 + 1 or box.y0 < page.y0 - 1 or box.y1 > page.y1 + 1
    ]  # fmt: skip
    touching = [
        f"{first!r} on {second!r}"
        for (first, one), (second, other) in combinations(boxes, 2)
        if min(one.x1, other.x1) - max(one.x0, other.x0) > 0.5
        and min(one.y1, other.y1) - max(one.y0, other.y0) > 0.5
    ]
    return outside + touching


def hidden_ticks(figure: Figure) -> list[Text]:
    """Labels of ticks that lie outside of their axis and are therefore not drawn."""
    hidden = []
    for axes in figure.findobj(Axes):
        assert isinstance(axes, Axes)
        for axis, (low, high) in ((axes.xaxis, axes.get_xlim()), (axes.yaxis, axes.get_ylim())):
            slack = 1e-9 * abs(high - low)
            for tick in [*axis.get_major_ticks(), *axis.get_minor_ticks()]:
                if (
                    not (min(low, high) - slack <= tick.get_loc() <= max(low, high) + slack)
                    or not axes.axison
                ):
                    hidden += [tick.label1, tick.label2]
            if not axes.axison:
                hidden.append(axis.label)
    return hidden


def test_every_slot_keeps_its_colour_and_they_differ():
    colours = slot_colours([f"slot{n}" for n in range(8)])
    assert list(colours.values()) == list(SLOT_COLOURS)
    assert len(set(SLOT_COLOURS)) == 8


def test_slots_are_in_the_order_of_the_checkpoint(tmp_path: Path):
    folder = write_run(tmp_path, lines(2, pairs=False, slots=("b", "a", "c")))
    assert RunRecords.read(folder).slots == ["b", "a", "c"]


def test_the_picture_is_replaced_whole(tmp_path: Path):
    write_run(tmp_path, lines(3, pairs=False))
    (tmp_path / "report.png").write_bytes(b"old")
    picture = write_report(tmp_path, "again")
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.jsonl", "report.png"]


def test_a_run_that_logged_nothing_yet_has_a_picture_too(tmp_path: Path):
    assert write_report(tmp_path).stat().st_size > 0


def test_a_torn_last_line_and_numbers_that_are_none_are_left_out(tmp_path: Path):
    text = '{"step": 1, "loss": 2.0}\n{"step": 2, "loss": NaN, "note": "x", "flag": true}\n{"step": 3, "lo'
    (tmp_path / "metrics.jsonl").write_text(text)
    records = RunRecords.read(tmp_path)
    assert records.metrics.keys() == {"loss"}
    assert records.series("loss").values == [2.0]


@pytest.mark.parametrize("line", ["not json", "[1]", '{"loss": 1.0}'])
def test_a_broken_line_is_named(line: str, tmp_path: Path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n' + line + "\n")
    with pytest.raises(TrainingFailed, match=r"metrics\.jsonl, line 2") as caught:
        RunRecords.read(tmp_path)
    assert caught.value.reason is Reason.STATE_BROKEN


def test_smoothing_keeps_what_is_constant_and_does_not_trail():
    assert smoothed([3.0] * 50) == pytest.approx([3.0] * 50)
    slope = [float(step) for step in range(100)]
    assert smoothed(slope)[10:90] == pytest.approx(slope[10:90])
    noise = np.random.default_rng(0).normal(0, 1, 400).tolist()
    assert np.std(smoothed(noise)) < 0.4
    assert len(smoothed([1.0])) == 1


def test_labels_are_moved_apart_as_little_as_needed():
    assert spread([0.1, 0.5, 0.9], room=0.1) == [0.1, 0.5, 0.9]
    moved = spread([0.5, 0.5, 0.52], room=0.1)
    assert all(high - low >= 0.1 - 1e-3 for low, high in pairwise(moved))
    assert math.isclose(sum(moved) / 3, 1.52 / 3, abs_tol=1e-6)
    assert all(0 <= height <= 1 for height in spread([0.99, 1.0, 1.0], room=0.1))
