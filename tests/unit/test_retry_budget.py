"""The budget of retries: savings first, then one after the other."""

from __future__ import annotations

import pytest

from router_service.retry_budget import MOST_OWED, RetryBudget


def test_savings_are_spent_at_once_and_what_follows_stands_in_line() -> None:
    budget = RetryBudget(per_second=10.0, burst=3.0)
    assert [budget.take(5.0) for _ in range(5)] == pytest.approx([0.0, 0.0, 0.0, 0.1, 0.2])


def test_it_earns_with_time_and_never_more_than_it_may_save() -> None:
    budget = RetryBudget(per_second=10.0, burst=3.0)
    for _ in range(5):
        budget.take(0.0)
    assert budget.take(0.4) == 0.0  # 2 owed, 4 earned
    waits = [budget.take(1000.0) for _ in range(4)]
    assert waits == pytest.approx([0.0, 0.0, 0.0, 0.1])


def test_nobody_in_a_storm_waits_longer_than_it_takes_to_earn_what_may_be_owed() -> None:
    budget = RetryBudget(per_second=10.0, burst=30.0)
    waits = [budget.take(0.0) for _ in range(230)]
    assert waits[30:50] == pytest.approx([number / 10 for number in range(1, 21)])
    assert max(waits) == pytest.approx(MOST_OWED / 10)


def test_a_clock_that_stands_still_earns_nothing() -> None:
    budget = RetryBudget(per_second=10.0, burst=1.0)
    budget.take(1.0)
    assert budget.take(1.0) > 0
