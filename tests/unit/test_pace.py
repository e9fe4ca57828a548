"""Long work tells how far it is about once a second, short work tells nothing, and both can be stopped."""

from __future__ import annotations

from pathlib import Path

import pytest

from trainer.pace import Pace
from trainer.run_context import RunContext, RunProgress, Stopped


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def started(num_steps: int, done: int = 0) -> tuple[Pace, Clock, list[RunProgress], RunContext]:
    told: list[RunProgress] = []
    clock, context = Clock(), RunContext(Path(), report=told.append)
    return Pace(context, "labels", num_steps, done, clock), clock, told, context


def test_short_work_tells_nothing():
    pace, clock, told, _ = started(100)
    for _ in range(100):
        clock.now += 0.019
        pace.advance()
    assert told == []


def test_long_work_tells_once_a_second_after_two():
    pace, clock, told, _ = started(100)
    for _ in range(100):
        clock.now += 0.1
        pace.advance(metrics={"problems": 1.0})
    assert 8 <= len(told) <= 9
    assert told[0].stage == "labels" and told[0].num_steps == 100 and told[0].metrics == {"problems": 1.0}
    assert 20 <= told[0].step <= 21


def test_the_remaining_time_rests_on_the_speed_of_this_attempt_alone():
    pace, clock, told, _ = started(100, done=40)
    clock.now += 5.0
    pace.advance(10)
    assert told[0].step == 50
    assert told[0].remaining_seconds == pytest.approx(25.0)  # 10 in 5 s, 50 are left


def test_work_of_unknown_length_has_no_remaining_time():
    pace, clock, told, _ = started(0)
    clock.now += 5.0
    pace.advance(10)
    assert told[0].remaining_seconds is None


def test_a_request_to_stop_ends_the_work_at_its_next_step():
    pace, _, _, context = started(100)
    pace.advance()
    context.stop.request()
    with pytest.raises(Stopped):
        pace.advance()


def test_nobody_needs_to_be_told():
    Pace(None, "data").advance()
