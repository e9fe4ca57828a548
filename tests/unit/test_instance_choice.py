"""Which instance of a slot a session asks."""

from __future__ import annotations

from itertools import permutations

import pytest

from router_service.instance_choice import NEW_SESSION, Standing, View, Wish, can_be_asked, choose


def chosen(views: list[View], wish: Wish = NEW_SESSION, draw: float = 0.0) -> str | None:
    """The same in whatever order they come."""
    names = set()
    for order in permutations(views):
        view = choose(order, wish, lambda: draw)
        names.add(None if view is None else view.name)
    assert len(names) == 1
    return names.pop()


def ready(name: str, **facts: object) -> View:
    return View(name, Standing.READY, facts.pop("epoch", 5), **facts)  # type: ignore[arg-type]


def test_a_new_session_goes_to_the_least_loaded() -> None:
    assert chosen([ready("a", load=2.0), ready("b", load=1.0), ready("c", load=3.0)]) == "b"


def test_sessions_that_begin_together_spread_over_equal_instances() -> None:
    draws = iter([0.9, 0.1, 0.1, 0.9])
    views = [ready("a"), ready("b")]
    names = [choose(views, NEW_SESSION, lambda: next(draws)) for _ in range(2)]
    assert names == [views[1], views[0]]


def test_a_session_sticks_to_its_instance_however_loaded() -> None:
    views = [ready("a", load=50.0), ready("b")]
    assert chosen(views, Wish(home="a")) == "a"
    assert chosen(views, Wish(former_home="a")) == "a"
    assert chosen(views, Wish(home="b", former_home="a")) == "b"


def test_one_that_has_cached_the_session_comes_before_one_that_has_not() -> None:
    views = [ready("a", load=50.0), ready("b")]
    assert chosen(views, Wish(home="gone", cached_length=lambda name: 7 if name == "a" else 0)) == "a"


def test_one_that_just_failed_is_passed_over_and_better_than_nobody() -> None:
    assert chosen([ready("a", is_suspect=True), ready("b")], Wish(home="a")) == "b"
    assert chosen([ready("a", is_suspect=True)], Wish(home="a")) == "a"


def test_an_open_breaker_keeps_everybody_out() -> None:
    assert chosen([ready("a", is_let_in=False), ready("b", load=9.0)], Wish(home="a")) == "b"
    assert chosen([ready("a", is_let_in=False)]) is None


def test_one_on_standby_is_never_asked() -> None:
    assert chosen([View("a", Standing.STANDBY, 5)]) is None
    assert not can_be_asked(View("a", Standing.STANDBY, 5), 0)


def test_who_migrates_is_left_as_soon_as_a_ready_one_exists_and_not_before() -> None:
    migrating = View("a", Standing.MIGRATING, 5)
    assert chosen([migrating, ready("b", load=9.0)], Wish(home="a")) == "b"
    assert chosen([migrating], Wish(home="a")) == "a"


@pytest.mark.parametrize("epoch", [4, 5, 6])
def test_who_finishes_keeps_running_turns_and_gets_no_new_ones(epoch: int) -> None:
    views = [View("a", Standing.FINISHING, 5), ready("b", epoch=epoch, load=9.0)]
    assert chosen(views, Wish(home="a")) == "a"
    assert chosen(views, Wish(former_home="a")) == "b"
    assert chosen(views) == "b"
    assert chosen(views[:1]) == "a"


def test_epochs_never_go_back_within_a_turn() -> None:
    old, new = View("a", Standing.READY, 4), View("b", Standing.READY, 5, load=9.0)
    assert chosen([old, new], Wish(home="a", floor=5)) == "b"
    assert chosen([old], Wish(home="a", floor=5)) is None
    finishing = View("a", Standing.FINISHING, 4)
    assert chosen([finishing, new], Wish(home="a", floor=5)) == "b"


def test_the_newest_weights_come_first() -> None:
    assert chosen([ready("a", epoch=4), ready("b", epoch=5, load=9.0)], Wish(home="a")) == "b"


def test_who_vanished_from_the_registry_is_the_last_resort() -> None:
    vanished = View("a", Standing.VANISHED, 5)
    assert chosen([vanished]) == "a"
    assert chosen([vanished, View("b", Standing.MIGRATING, 5)], Wish(home="a")) == "b"
    assert chosen([vanished, ready("b", is_suspect=True)], Wish(home="a")) == "a"
