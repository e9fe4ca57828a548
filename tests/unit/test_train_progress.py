"""How far a training run is, as people see it."""

from __future__ import annotations

import io

from rich.console import Console

from fusionroute.cli.train_progress import ProgressLines, duration_text, figures_text, shown_progress
from trainer.run_context import RunProgress


def test_lines_come_at_begin_and_end_of_a_stage_and_every_ten_seconds():
    out, seconds = io.StringIO(), [0.0]
    lines = ProgressLines(Console(file=out, width=200), clock=lambda: seconds[0])
    for step in range(0, 31):
        seconds[0] = float(step)
        lines.show(RunProgress("training", step, 30, loss=0.5, remaining_seconds=30.0 - step))
    lines.show(RunProgress("gates", 0, 0))
    assert out.getvalue().splitlines() == [
        "training 0/30, loss 0.500, 30 s left",
        "training 10/30, loss 0.500, 20 s left",
        "training 20/30, loss 0.500, 10 s left",
        "training 30/30, loss 0.500",
        "gates 0",
    ]


def test_on_a_terminal_every_stage_has_a_bar():
    out = io.StringIO()
    screen = Console(file=out, force_terminal=True, width=140, color_system=None)
    with shown_progress(screen) as show:
        show(RunProgress("labels", 5, 10))
        show(RunProgress("training", 120, 372, 0.41, {"rewards/accuracies": 0.93, "unknown": 1.0}, 187.0))
    last = out.getvalue()
    assert "labels" in last and "5/10" in last
    assert "120/372" in last and "3:07 min left" in last and "loss 0.410, accuracy 0.93" in last


def test_durations_and_figures_are_written_as_people_say_them():
    assert [duration_text(seconds) for seconds in (0.4, 59, 187, 7500)] == [
        "0 s",
        "59 s",
        "3:07 min",
        "2:05 h",
    ]
    assert figures_text(RunProgress("pairs", 1, 2, metrics={"greedy_wrong": 1200.0})) == "wrong 1,200"


def test_a_note_of_a_run_is_printed_once_above_its_progress() -> None:
    out = io.StringIO()
    with shown_progress(Console(file=out, width=200)) as show:
        show(RunProgress("bias", 3, 3, note="bias of 3 pairs [mean]\nWARNING: far above zero"))
        show(RunProgress("training", 1, 9, note="bias of 3 pairs [mean]\nWARNING: far above zero"))
    lines = out.getvalue().splitlines()
    assert lines[:2] == ["bias of 3 pairs [mean]", "WARNING: far above zero"]
    assert sum("WARNING" in line for line in lines) == 1 and lines[-1].startswith("training")
