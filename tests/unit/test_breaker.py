"""The breaker of an instance: what opens it, who may come in, when it closes."""

from __future__ import annotations

import pytest

from router_service.breaker import (
    FIRST_PAUSE_SECONDS,
    LONGEST_PAUSE_SECONDS,
    NUM_FAULTS,
    Breaker,
    BreakerState,
)


def opened(now: float = 0.0, jitter: float = 1.0) -> Breaker:
    breaker = Breaker(jitter=lambda: jitter)
    assert breaker.fail(now, silent=True)
    return breaker


def knocked(breaker: Breaker, now: float, *, well: bool) -> None:
    assert breaker.should_knock(now)
    breaker.knock()
    breaker.answered(now, well=well)


def test_several_faults_in_a_row_open_it_and_fewer_do_not() -> None:
    breaker = Breaker()
    opens = [breaker.fail(0.0) for _ in range(NUM_FAULTS)]
    assert opens == [False] * (NUM_FAULTS - 1) + [True]
    assert not breaker.lets_in()


def test_a_success_in_between_starts_the_count_anew() -> None:
    breaker = Breaker()
    for _ in range(5 * NUM_FAULTS):
        assert not breaker.fail(0.0)
        assert not breaker.succeed()
    assert breaker.lets_in()


def test_one_silence_opens_it() -> None:
    assert opened().state is BreakerState.OPEN


def test_nobody_comes_in_before_a_knock_was_answered_well() -> None:
    breaker = opened()
    assert not breaker.should_knock(FIRST_PAUSE_SECONDS * 0.9)
    knocked(breaker, FIRST_PAUSE_SECONDS, well=False)
    assert not breaker.lets_in()
    knocked(breaker, 100.0, well=True)
    assert breaker.lets_in()


def test_one_knock_at_a_time() -> None:
    breaker = opened()
    breaker.knock()
    assert not breaker.should_knock(100.0)


def test_half_open_lets_in_one_probe_whose_success_closes_it() -> None:
    breaker = opened()
    knocked(breaker, 1.0, well=True)
    breaker.begin()
    assert not breaker.lets_in()
    assert breaker.succeed()
    assert breaker.state is BreakerState.CLOSED
    assert breaker.lets_in()


def test_a_probe_that_fails_opens_it_again_for_longer() -> None:
    breaker = opened()
    knocked(breaker, 1.0, well=True)
    breaker.begin()
    assert breaker.fail(2.0)
    assert not breaker.should_knock(2.0 + 1.9 * FIRST_PAUSE_SECONDS)
    assert breaker.should_knock(2.0 + 2.0 * FIRST_PAUSE_SECONDS)


def test_a_probe_that_says_nothing_about_the_server_makes_room_for_another() -> None:
    breaker = opened()
    knocked(breaker, 1.0, well=True)
    breaker.begin()
    breaker.leave()
    assert breaker.lets_in()
    assert breaker.state is BreakerState.HALF_OPEN


def test_pauses_grow_up_to_a_limit() -> None:
    breaker, now, pauses = opened(), 0.0, []
    for _ in range(10):
        began = now
        while not breaker.should_knock(now):
            now += 0.01
        pauses.append(now - began)
        knocked(breaker, now, well=False)
    assert pauses[1] == pytest.approx(2 * pauses[0], abs=0.03)
    assert pauses[-3:] == pytest.approx([LONGEST_PAUSE_SECONDS] * 3, abs=0.03)


def test_pauses_have_jitter_of_half_their_length() -> None:
    assert opened(jitter=0.0).should_knock(FIRST_PAUSE_SECONDS / 2)
    assert not opened(jitter=0.99).should_knock(FIRST_PAUSE_SECONDS / 2)


def test_faults_of_calls_that_began_before_it_opened_prolong_nothing() -> None:
    breaker = opened()
    for _ in range(20):
        assert not breaker.fail(0.1)
    assert breaker.should_knock(FIRST_PAUSE_SECONDS)
