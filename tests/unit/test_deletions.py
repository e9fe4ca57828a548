"""Who is told of deleted sessions, and when."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from router_service import deletions, session_closing
from router_service.deletions import CLOCKS_DIFFER_SECONDS, REMEMBERED_SECONDS, Deletions
from router_service.session_closing import SessionCloser

NOW = 1_700_000_000.0


def test_everybody_is_told_of_each_deletion_until_it_has_heard() -> None:
    known, loaded = Deletions(), {"a": NOW, "b": NOW}
    assert known.untold(loaded, NOW) == {}
    known.add("s1", NOW)
    known.add("s2", NOW + 1)
    known.told("a", "s1")
    known.told("nobody", "s1")
    assert known.untold(loaded, NOW) == {"a": ["s2"], "b": ["s1", "s2"]}


def test_who_comes_back_is_told_of_what_was_deleted_since_its_model_was_loaded() -> None:
    known = Deletions()
    known.untold({"a": NOW - 500}, NOW)
    known.add("before", NOW - 400)
    known.told("a", "before")
    known.untold({}, NOW)  # it has gone
    known.add("meanwhile", NOW)
    # Told once too often does no harm.
    assert known.untold({"a": NOW - 500}, NOW) == {"a": ["before", "meanwhile"]}
    assert known.untold({"new": NOW - 300}, NOW) == {"new": ["meanwhile"]}
    assert known.untold({"clock ahead": NOW + CLOCKS_DIFFER_SECONDS}, NOW) == {"clock ahead": ["meanwhile"]}


def test_deletions_are_forgotten_in_time_and_beyond_a_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deletions, "MOST_REMEMBERED", 3)
    known, loaded = Deletions(), {"a": 0.0}
    known.untold(loaded, NOW)
    for number in range(5):
        known.add(f"s{number}", NOW + number)
    known.add("s3", NOW + 5)  # deleted again
    assert known.untold({"a": 0.0, "b": 0.0}, NOW) == {"a": ["s2", "s3", "s4"], "b": ["s2", "s4", "s3"]}
    known.add("later", NOW + 5 + REMEMBERED_SECONDS)
    assert known.untold(loaded, NOW) == {"a": ["s3", "later"]}
    assert known.untold(loaded, NOW + 6 + REMEMBERED_SECONDS) == {"a": ["later"]}
    assert known.untold(loaded, NOW + 6 + 2 * REMEMBERED_SECONDS) == {}


class FakeInstance:
    """An expert that notes what it is told."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.entry = SimpleNamespace(model=SimpleNamespace(epoch=0))
        self.answers = True
        self.heard: list[str] = []
        self.num_asked = 0

    async def close_session(self, session_id: str, fence: int, *, may_share: bool = False) -> bool:
        self.num_asked += 1
        await asyncio.sleep(0)
        if self.answers:
            self.heard.append(session_id)
        return self.answers


async def eventually(condition: Any) -> None:
    async with asyncio.timeout(5.0):
        while not condition():
            await asyncio.sleep(0.005)


async def test_experts_that_were_away_or_silent_are_told_when_they_can_be(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(session_closing, "TELL_AGAIN_SECONDS", 0.01)
    here, silent, away = (FakeInstance(name) for name in ("here", "silent", "away"))
    directory = SimpleNamespace(instances={"1": here, "2": silent})
    served = SimpleNamespace(all=list)
    sessions = [f"s{number}" for number in range(2 * session_closing.MOST_TOLD_AT_A_TIME)]
    closer: Any = SessionCloser
    async with closer(served, directory).running() as closing:
        silent.answers = False
        for session in sessions:
            await closing.forget(session)
        assert set(here.heard) == set(sessions)
        directory.instances["3"] = away
        await eventually(lambda: set(away.heard) == set(sessions))
        num_asked = silent.num_asked
        await asyncio.sleep(0.1)
        # Each time it is asked no more than a few, since it does not answer those.
        assert num_asked < silent.num_asked <= num_asked + 12 * session_closing.MOST_TOLD_AT_A_TIME
        silent.answers = True
        await eventually(lambda: set(silent.heard) == set(sessions))
        nums_asked = [each.num_asked for each in (here, silent, away)]
        await asyncio.sleep(0.05)
    assert [each.num_asked for each in (here, silent, away)] == nums_asked  # all have heard
