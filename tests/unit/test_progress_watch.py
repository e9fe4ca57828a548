"""Health means progress."""

from __future__ import annotations

from fusionroute.grpc_runtime import Progress, ProgressWatch, backoff_seconds


def test_idle_is_healthy_for_ever() -> None:
    watch = ProgressWatch(frozen_after_seconds=10)
    assert all(watch.is_healthy(Progress(pending=False, tick=4), now) for now in (0, 100, 10_000))


def test_busy_is_healthy_while_the_tick_moves() -> None:
    watch = ProgressWatch(frozen_after_seconds=10)
    assert all(watch.is_healthy(Progress(pending=True, tick=now), now) for now in range(0, 100, 9))


def test_pending_work_without_a_tick_is_frozen_until_it_moves_again() -> None:
    watch = ProgressWatch(frozen_after_seconds=10)
    verdicts = [watch.is_healthy(Progress(pending=True, tick=1), now) for now in (0.0, 9.9, 10.0, 50.0)]
    assert verdicts == [True, True, False, False]
    assert watch.is_healthy(Progress(pending=True, tick=2), 51.0)


def test_work_that_comes_after_a_long_rest_has_its_full_time() -> None:
    watch = ProgressWatch(frozen_after_seconds=10)
    watch.is_healthy(Progress(pending=False, tick=1), 0.0)
    watch.is_healthy(Progress(pending=False, tick=1), 1000.0)
    assert watch.is_healthy(Progress(pending=True, tick=1), 1005.0)
    assert not watch.is_healthy(Progress(pending=True, tick=1), 1010.0)


def test_backoff_doubles_up_to_its_limit_and_keeps_half() -> None:
    for attempt, full in enumerate([0.2, 0.4, 0.8, 1.6, 3.2, 5.0, 5.0]):
        waits = [backoff_seconds(attempt, first=0.2, most=5.0) for _ in range(50)]
        assert full / 2 <= min(waits) < max(waits) <= full
    assert backoff_seconds(10**6) <= 10.0
