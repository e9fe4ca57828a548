"""What a build shows: bars on a terminal, few plain lines elsewhere."""

from __future__ import annotations

import io

from rich.console import Console

from trainer.lab_family import Progress, shown

STEPS = [
    Progress("waiting", 0, 1, 0.0, 0.0),
    Progress("base", 10, 20, 2.5, 0.2),
    Progress("base", 20, 20, 1.25, 0.4),
    Progress("router", 30, 30, 0.5, 1.0),
]


def output_of(*, terminal: bool, one_bar: bool = False) -> str:
    text = io.StringIO()
    with shown(Console(file=text, force_terminal=terminal, width=120), one_bar=one_bar) as callback:
        for progress in STEPS:
            callback(progress)
    return text.getvalue()


def test_without_a_terminal_each_finished_stage_is_one_plain_line() -> None:
    lines = output_of(terminal=False).splitlines()
    assert len(lines) == 3
    assert "waiting" in lines[0]
    assert lines[1].startswith("lab base: 20 steps, loss 1.250, 40% of the build after ")
    assert lines[2].startswith("lab router: 30 steps, loss 0.500, 100% of the build after ")


def test_on_a_terminal_stage_step_and_loss_are_shown_in_bars() -> None:
    text = output_of(terminal=True)
    for part in ("build", "base", "step 20/20  loss 1.250", "step 30/30  loss 0.500", "100%"):
        assert part in text


def test_of_many_stages_one_bar_tells_the_share_and_the_last_one() -> None:
    text = output_of(terminal=True, one_bar=True)
    assert "router, step 30/30, loss 0.500" in text and "100%" in text
    assert "build" not in text
