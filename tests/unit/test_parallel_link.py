"""The link between the processes of a split model, and what travels on it."""

from __future__ import annotations

import inspect
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import pytest
import torch

from fusionroute.engine.kv_cache import KVCache, SessionCache
from fusionroute.engine.parallel_cache import MIRRORED, NotedCache, repeat
from fusionroute.engine.parallel_link import SECRET_BYTES, FollowerEnd, LeadEnd, PeerLost
from fusionroute.engine.parallel_messages import CacheCall, ForwardOrder, SegmentPlace, pack, unpack

HOST = "127.0.0.1"
SECONDS = 10.0


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as opened:
        yield opened


def linked(stack: ExitStack, num_followers: int = 2) -> tuple[LeadEnd, list[FollowerEnd]]:
    lead = LeadEnd(HOST, num_followers)
    followers = [
        stack.enter_context(FollowerEnd(HOST, lead.port, lead.secret, rank, SECONDS))
        for rank in range(1, num_followers + 1)
    ]
    lead.accept(SECONDS)
    return lead, followers


def test_every_follower_gets_every_order_and_the_farewell(stack: ExitStack) -> None:
    lead, followers = linked(stack)
    with lead:
        lead.send(b"one")
        lead.send(b"x" * 300_000)
    for follower in followers:
        assert follower.receive() == b"one"
        assert follower.receive() == b"x" * 300_000
        assert follower.receive() is None


def test_nobody_is_ready_before_everybody_is(stack: ExitStack) -> None:
    lead, (first, second) = linked(stack)
    stack.enter_context(lead)
    with ThreadPoolExecutor(3) as pool:
        leading = pool.submit(lead.wait_until_ready, SECONDS)
        waiting = pool.submit(first.wait_until_ready, SECONDS)
        assert not leading.done() and not waiting.done()
        second.wait_until_ready(SECONDS)
        leading.result(SECONDS)
        waiting.result(SECONDS)


def test_a_follower_that_ends_is_noticed_while_nothing_is_asked_of_it(stack: ExitStack) -> None:
    lead, (_, second) = linked(stack)
    stack.enter_context(lead)
    reasons: list[str] = []
    noticed = threading.Event()

    def note(why: str) -> None:
        reasons.append(why)
        noticed.set()

    lead.watch(note)
    second.__exit__(None, None, None)
    assert noticed.wait(SECONDS)
    assert reasons == ["process 2 of the model has ended"]
    with pytest.raises(PeerLost, match="process 2"):
        lead.send(b"order")
    lead.lose("something later")
    assert reasons == ["process 2 of the model has ended"]


def test_a_lead_that_ends_without_a_farewell_is_gone(stack: ExitStack) -> None:
    lead, followers = linked(stack)
    with pytest.raises(ZeroDivisionError), lead:
        raise ZeroDivisionError
    for follower in followers:
        with pytest.raises(PeerLost, match="process 0"):
            follower.receive()


def test_a_follower_that_fails_before_it_is_ready_stops_the_others(stack: ExitStack) -> None:
    lead, (first, second) = linked(stack)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(first.wait_until_ready, SECONDS)
        second.__exit__(None, None, None)
        with pytest.raises(PeerLost, match="process 2 has ended before it was ready"), lead:
            lead.wait_until_ready(SECONDS)
        with pytest.raises(PeerLost, match="process 0"):
            waiting.result(SECONDS)


def test_strangers_are_not_followers(stack: ExitStack) -> None:
    lead = stack.enter_context(LeadEnd(HOST, 1))
    silent = stack.enter_context(socket.create_connection((HOST, lead.port)))
    silent.shutdown(socket.SHUT_WR)
    stack.enter_context(FollowerEnd(HOST, lead.port, bytes(SECRET_BYTES), 1, SECONDS))
    stack.enter_context(FollowerEnd(HOST, lead.port, lead.secret, 7, SECONDS))
    with pytest.raises(PeerLost, match=r"processes \[1\] have not come"):
        lead.accept(0.3)


def test_an_order_arrives_as_it_was_sent() -> None:
    order = ForwardOrder(
        [CacheCall("room", ('a"b', 64, 0)), CacheCall("free", ("c",))],
        [SegmentPlace('a"b', 5, 0, 2), SegmentPlace("d", 0, 2, 3)],
        [7, 2**31 - 1, 0],
        [5, 6, 0],
        [1, 2],
        exact=True,
    )
    assert unpack(pack(order)) == order


def sent(calls: list[CacheCall]) -> list[CacheCall]:
    return list(unpack(pack(ForwardOrder(calls, [], [], [], []))).cache_calls)


def same(mine: SessionCache, theirs: SessionCache) -> bool:
    """Whether both hold the same, asked by writing one more token to each."""
    assert (mine.capacity_tokens, mine.num_shared) == (theirs.capacity_tokens, theirs.num_shared)
    shared = [view.pair(0, view.part.start)[0] for view in mine.shared]
    others = [view.pair(0, view.part.start)[0] for view in theirs.shared]
    assert len(shared) == len(others) and all(map(torch.equal, shared, others))
    more = torch.ones(1, 2, 2)
    at = mine.num_shared + mine.capacity_tokens - 1
    first, second = (cache.extend(0, at, more, more)[0] for cache in (mine, theirs))
    kept = mine.capacity_tokens // 2
    return torch.equal(first[:, :kept], second[:, :kept])


def test_caches_that_repeat_what_was_noted_hold_the_same() -> None:
    noted, others = NotedCache(), KVCache()
    known: dict[str, SessionCache] = {}
    first = noted.room("a", 8, 0)
    noted.room("b", 2, 0)
    repeat(sent(noted.take_calls()), others, known)
    new = torch.arange(32.0).reshape(8, 2, 2)
    for cache in (first, known["a"]):
        cache.extend(0, 0, new, new)
    noted.copy("c", "a", 6, 12)
    noted.split("a", "part", 4, 8, 8)
    noted.build_upon("d", 4, [("part", 3)])
    noted.rename("a", "e")
    noted.free("b")
    mine = {name: noted.room(name, 8, 6) for name in "cde"}
    repeat(sent(noted.take_calls()), others, known)
    assert set(known) == {"c", "d", "e"}
    assert [noted.session_of(mine[name]) for name in "cde"] == ["c", "d", "e"]
    assert known["d"].num_shared == 3 and known["e"].num_shared == 4
    assert all(same(mine[name], known[name]) for name in "ce")
    noted.free("d")
    noted.free("e")
    noted.free_part("part")
    repeat(sent(noted.take_calls()), others, known)
    assert set(known) == {"c"}
    assert noted.take_calls() == []
    noted.room("c", 8, 7)
    assert noted.take_calls() == [], "room that is there already is no change"


def test_every_change_of_the_caches_is_noted() -> None:
    public = {name for name, _ in inspect.getmembers(KVCache, inspect.isfunction) if not name.startswith("_")}
    assert public == set(MIRRORED), (
        "a new method of KVCache must be noted, or named here as one that only reads"
    )
