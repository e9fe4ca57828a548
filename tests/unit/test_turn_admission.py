"""Turns are admitted by number and by memory, and a refusal says when to come back."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from fusionroute.errors import FusionRouteError, InvalidRequest, OutOfRoom, Reason
from router_service.token_pace import PaceLimit, percentile
from router_service.turn_admission import KvBudget, TurnAdmission


@dataclass
class Clock:
    """A clock that stands still until it is moved."""

    now: float = 100.0

    def __call__(self) -> float:
        return self.now


def admission(
    clock: Clock | None = None, *, max_running: int = 4, tokens: int = 1000, longest: int = 600
) -> TurnAdmission:
    return TurnAdmission(
        max_running, lambda: KvBudget(tokens, longest), clock=clock or Clock(), jitter=lambda: 0.5
    )


def refused(room: TurnAdmission, num_tokens: int = 10) -> FusionRouteError:
    with pytest.raises(FusionRouteError) as refusal:
        room.reserve(num_tokens)
    return refusal.value


def test_only_so_many_turns_run_and_a_released_one_makes_room() -> None:
    room = admission(max_running=2)
    first = room.reserve(10)
    room.reserve(10)
    assert refused(room).reason is Reason.QUEUE_FULL
    with pytest.raises(OutOfRoom):
        room.check()
    first.release()
    room.check()
    room.reserve(10)


def test_releasing_twice_gives_the_room_back_once() -> None:
    room = admission()
    first = room.reserve(10)
    room.reserve(20)
    first.release()
    first.release()
    assert (room.num_running, room.tokens_reserved) == (1, 20)


def test_turns_whose_tokens_do_not_fit_together_wait_for_memory() -> None:
    room = admission(tokens=1000, longest=600)
    first = room.reserve(600)
    room.reserve(400)
    error = refused(room, 1)
    assert isinstance(error, OutOfRoom) and error.reason is Reason.KV_MEMORY_FULL
    assert "1000 tokens" in error.message and error.retry_after_seconds is not None
    first.release()
    room.reserve(600)


def test_a_turn_that_could_never_fit_is_refused_for_good() -> None:
    error = refused(admission(longest=600), 601)
    assert isinstance(error, InvalidRequest) and error.reason is Reason.CONTEXT_FULL
    assert "601" in error.message and error.metadata["limit"] == "600"
    assert error.retry_after_seconds is None


def test_a_turn_that_is_alone_may_take_all_there_is() -> None:
    """Experts may have left since the others were admitted; somebody must always be served."""
    room = admission(tokens=300, longest=600)
    room.reserve(600)
    assert refused(room, 1).reason is Reason.KV_MEMORY_FULL


def test_the_hint_follows_the_rate_at_which_turns_end() -> None:
    clock = Clock()
    room = admission(clock, max_running=2)
    held = [room.reserve(10) for _ in range(2)]
    for _ in range(10):  # two turns end each second
        clock.now += 0.5
        held.pop(0).release()
        held.append(room.reserve(10))
    clock.now += 0.5
    hints = [refused(room).retry_after_seconds or 0.0 for _ in range(3)]
    assert hints[0] == pytest.approx(0.5, rel=0.05)
    assert hints[1] == pytest.approx(1.0, rel=0.05)  # the place that comes free first is taken
    assert hints[2] == pytest.approx(1.5, rel=0.05)


def test_hints_are_bounded_and_differ() -> None:
    clock, draws = Clock(), iter([0.0, 1.0, 0.3])
    room = TurnAdmission(1, lambda: KvBudget(1000, 1000), clock=clock, jitter=lambda: next(draws))
    room.reserve(10).release()
    clock.now += 0.001
    room.reserve(10)
    assert refused(room).retry_after_seconds == 0.1
    clock.now += 29.0  # no turn has ended since: the rate is very low
    hint = refused(room).retry_after_seconds
    assert hint == 10.0
    clock.now += 60.0  # nothing is known any more
    assert 0.1 < (refused(room).retry_after_seconds or 0.0) < 1.0


def test_a_reservation_is_released_by_its_context_unless_it_was_handed_over() -> None:
    room = admission()
    with room.reserve(10):
        assert room.num_running == 1
    assert room.num_running == 0
    with pytest.raises(RuntimeError), room.reserve(10):
        raise RuntimeError
    assert room.num_running == 0
    with room.reserve(10) as reservation:
        reservation.hand_over()
    assert room.num_running == 1
    reservation.release()
    assert room.num_running == 0


def hear_one_round(pace: PaceLimit, clock: Clock, latency_seconds: float, num_running: int) -> int:
    """Twenty tokens within a second; returns the limit after it."""
    clock.now += 1.0
    for _ in range(20):
        pace.observe(latency_seconds, num_running)
    return pace.limit


def test_slow_tokens_lower_the_limit_and_fast_ones_raise_it_again() -> None:
    clock = Clock()
    pace = PaceLimit(0.1, 10, clock)
    assert hear_one_round(pace, clock, 0.2, num_running=10) == 8
    assert hear_one_round(pace, clock, 0.2, num_running=10) == 6
    assert (
        hear_one_round(pace, clock, 0.05, num_running=5) == 6
    )  # it is not used up: nothing says that more is well
    assert hear_one_round(pace, clock, 0.05, num_running=6) == 7
    for num_running in (7, 8, 9, 10, 10):
        limit = hear_one_round(pace, clock, 0.05, num_running)
    assert limit == 10


def test_the_limit_falls_below_what_runs_but_never_below_one_turn() -> None:
    clock = Clock()
    pace = PaceLimit(0.1, 10, clock)
    assert hear_one_round(pace, clock, 0.2, num_running=3) == 2
    for _ in range(5):
        assert hear_one_round(pace, clock, 0.2, num_running=1) == 1


def test_new_turns_are_refused_while_tokens_are_slow() -> None:
    clock = Clock()
    room = TurnAdmission(
        4, lambda: KvBudget(10**6, 10**6), PaceLimit(0.1, 4, clock), clock=clock, jitter=lambda: 0.5
    )
    turns = [room.reserve(10) for _ in range(4)]
    for _ in range(6):  # the first token of each has no latency: it includes reading the prompt
        clock.now += 0.2
        for turn in turns:
            turn.token_written()
    assert room.limit == 3
    turns.pop().release()
    assert refused(room).reason is Reason.QUEUE_FULL
    turns.pop().release()
    room.reserve(10)


def test_one_token_in_twenty_may_be_slow() -> None:
    clock = Clock()
    pace = PaceLimit(0.1, 10, clock)
    for index in range(20):
        clock.now += 0.06
        pace.observe(5.0 if index == 7 else 0.06, 10)
    assert pace.limit == 10
    for index in range(20):
        clock.now += 0.06
        pace.observe(5.0 if index in (7, 8) else 0.06, 10)
    assert pace.limit == 8


def test_percentiles() -> None:
    assert percentile([3.0], 0.95) == 3.0
    assert percentile([float(value) for value in range(1, 101)], 0.99) == 99.0
    assert percentile([2.0, 1.0], 0.5) == 1.0
