"""When a forward is put off for sessions that are about to step: only where all get more tokens a second by it."""

from __future__ import annotations

import pytest

from fusionroute.engine.expectation import Expectation, ForwardCost

FIXED, PER_TOKEN = 0.030, 0.0005


def cost() -> ForwardCost:
    known = ForwardCost()
    for num_tokens in (1, 16, 4, 8, 12, 2) * 20:
        known.took(num_tokens, FIXED + PER_TOKEN * num_tokens)
    return known


def rhythmic(gaps: dict[str, float], turns: int = 30) -> tuple[Expectation, float]:
    """Sessions that were all answered together, each time, and stepped again after its gap; and when that was last."""
    expectation, now = Expectation(cost()), 0.0
    for _ in range(turns):
        for name, gap in gaps.items():
            expectation.stepped(name, now + gap)
        now += 0.1
        for name in gaps:
            expectation.answered(name, now)
    return expectation, now


def test_the_cost_of_forwards_is_learned() -> None:
    fixed, per_token = cost().line()
    assert fixed == pytest.approx(FIXED, rel=0.1)
    assert PER_TOKEN * 0.9 < per_token < PER_TOKEN * 2  # which the guess, five times as much, still draws up


def test_forwards_of_one_size_leave_a_share_to_the_guess() -> None:
    known = ForwardCost()
    for _ in range(50):
        known.took(8, 0.040)
    fixed, per_token = known.line()
    assert fixed == pytest.approx(0.028)
    assert fixed + 8 * per_token == pytest.approx(0.040)


def test_whoever_comes_first_waits_for_those_who_come_right_behind() -> None:
    expectation, now = rhythmic({f"s{number}": 0.002 + 0.0001 * number for number in range(16)})
    expectation.stepped("s0", now + 0.002)
    wait = expectation.wait_seconds(1, now + 0.002)
    assert 0.0005 < wait < 0.004
    for number in range(1, 16):
        expectation.stepped(f"s{number}", now + 0.0035)
    assert expectation.wait_seconds(16, now + 0.0035) == 0.0


def test_nobody_waits_alone() -> None:
    expectation, now = rhythmic({"s": 0.002})
    expectation.stepped("s", now + 0.002)
    assert expectation.wait_seconds(1, now + 0.002) == 0.0


def test_nobody_waits_for_longer_than_a_forward_takes_anyway() -> None:
    expectation, now = rhythmic({"soon": 0.002, "late": 0.060})
    expectation.stepped("soon", now + 0.002)
    assert expectation.wait_seconds(1, now + 0.002) == 0.0


def test_many_do_not_wait_for_one() -> None:
    expectation, now = rhythmic({"late": 0.012} | {f"s{number}": 0.001 for number in range(15)})
    for number in range(15):
        expectation.stepped(f"s{number}", now + 0.001)
    assert expectation.wait_seconds(15, now + 0.001) == 0.0
    assert expectation.wait_seconds(1, now + 0.001) > 0.0


def test_sessions_that_are_gone_or_late_are_not_waited_for() -> None:
    expectation, now = rhythmic({"a": 0.002, "b": 0.003, "c": 0.003})
    expectation.stepped("a", now + 0.002)
    assert expectation.wait_seconds(1, now + 0.002) > 0.0
    assert expectation.wait_seconds(1, now + 0.020) == 0.0
    expectation.forget("b")
    expectation.forget("c")
    assert expectation.wait_seconds(1, now + 0.002) == 0.0


def test_whoever_is_often_waited_for_in_vain_is_waited_for_no_more() -> None:
    expectation, now = rhythmic({"a": 0.002, "b": 0.020})
    expectation.stepped("a", now + 0.002)
    assert expectation.wait_seconds(1, now + 0.002) > 0.0
    for _ in range(30):
        expectation.waited_in_vain()
    assert expectation.wait_seconds(1, now + 0.002) == 0.0


def going_to_and_fro(num_sessions: int, gap: float, crowding: float = 1.0) -> tuple[Expectation, float]:
    """Sessions that step again `gap` seconds after each answer, all together, after many forwards."""
    expectation, now = rhythmic({f"s{number}": gap for number in range(num_sessions)})
    expectation.in_groups = True
    for _ in range(20):
        expectation.computed(num_sessions, FIXED + PER_TOKEN * num_sessions, FIXED / crowding, now)
    return expectation, now


def test_sessions_that_are_long_elsewhere_go_in_two_groups() -> None:
    assert going_to_and_fro(16, 0.060)[0].group_size == 8
    assert going_to_and_fro(15, 0.060)[0].group_size == 8


def test_one_group_stays_where_two_would_be_slower() -> None:
    """Nearly all of a forward is its fixed part, and elsewhere takes less than that: two would take longer than one."""
    assert going_to_and_fro(16, 0.002)[0].group_size is None
    assert going_to_and_fro(3, 0.060)[0].group_size is None


def test_groups_are_of_the_sessions_that_take_part_now() -> None:
    expectation, now = going_to_and_fro(16, 0.060)
    expectation.computed(1, FIXED, FIXED, now + 10.0)
    assert expectation.group_size is None


def test_a_group_is_waited_for_only_where_others_want_the_processors() -> None:
    expectation, now = going_to_and_fro(16, 0.060)
    assert expectation.wait_seconds(3, now + 0.5) == 0.0
    expectation, now = going_to_and_fro(16, 0.060, crowding=2.0)
    assert expectation.wait_seconds(3, now + 0.5) == pytest.approx(expectation.cost.line()[0])
    assert expectation.wait_seconds(8, now + 0.5) == 0.0
    for _ in range(50):
        expectation.waited_in_vain(others_came=True)
    assert expectation.confidence > 0.5, "a wait for whoever comes says nothing about who was expected"
    expectation.waited_in_vain()
    assert expectation.wait_seconds(3, now + 0.5) == 0.0, "nobody came: not for want of processors"
