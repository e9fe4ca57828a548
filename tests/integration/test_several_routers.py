"""Routers over one Redis: any of them follows any turn, and goes on with it when its writer is gone."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest

from fusionroute.errors import FusionRouteError, Reason
from fusionroute.unbroken import Patience
from fusionroute.v1 import router_pb2
from router_service.records import pack_prompt
from router_service.session_store import session_keys
from tests.expert_fakes import until
from tests.served_stack import Answer, Family, Stack, make_family, record_of, save_router
from tests.several_routers import GREEDY, PROMPT, SEEDED, Pair, ask, two_routers

LENGTH = 40


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Family:
    return make_family(tmp_path_factory.mktemp("family"), ("math", "strings"))


@pytest.fixture
async def pair(family: Family, redis_url: str, tmp_path: Path) -> AsyncIterator[Pair]:
    async with two_routers(family, redis_url, tmp_path) as pair:
        yield pair


async def unbroken(pair: Pair, request: router_pb2.GenerateRequest, breaks: list[str]) -> Answer:
    """Through a client of both, which never leaves a stream only because it is silent."""
    events = pair.both.unbroken(
        request, Patience(silent_seconds=60.0), on_break=lambda error: breaks.append(error.reason.value)
    )
    async with aclosing(events) as stream:
        return await Answer.read(stream)


def writes(router: Stack) -> int:
    return router.router.keeper.num_running


@pytest.mark.parametrize("sampling", [GREEDY, SEEDED], ids=["greedy", "seeded"])
async def test_a_turn_is_followed_on_another_router_while_it_is_written(
    pair: Pair, sampling: dict[str, Any]
) -> None:
    whole = await pair.second.answer(ask(LENGTH, sampling))
    pair.pace.seconds = 0.005
    writing = asyncio.create_task(
        pair.first.answer(ask(LENGTH, sampling, session_id=(sid := "f" + whole.started.session_id)))
    )
    await until(lambda: writes(pair.first) == 1, 10)
    answers = await asyncio.gather(*(pair.second.resume(sid, start) for start in (0, 0, 7)))
    assert writes(pair.second) == 0
    written = await writing
    assert written.ids == whole.ids
    for answer, start in zip(answers, (0, 0, 7), strict=True):
        assert [(t.index, t.id, t.text, t.expert, t.expert_epoch) for t in answer.tokens] == [
            (t.index, t.id, t.text, t.expert, t.expert_epoch) for t in written.tokens[start:]
        ]
        assert answer.started == written.started
        assert answer.finished is not None and written.finished is not None
        assert (answer.finished.reason, answer.finished.num_generated_tokens) == (
            written.finished.reason,
            LENGTH,
        )


@pytest.mark.parametrize("sampling", [GREEDY, SEEDED], ids=["greedy", "seeded"])
async def test_a_router_that_dies_is_succeeded_within_its_lease(pair: Pair, sampling: dict[str, Any]) -> None:
    whole = await pair.second.answer(ask(LENGTH, sampling))
    pair.pace.num_left = 12
    breaks: list[str] = []
    session_id = "d" + whole.started.session_id
    reading = asyncio.create_task(unbroken(pair, ask(LENGTH, sampling, session_id=session_id), breaks))
    await until(lambda: pair.pace.num_waiting == 1, 10)
    await pair.kill_first()
    answer = await asyncio.wait_for(reading, 40)
    assert (answer.ids, answer.text) == (whole.ids, whole.text)
    assert [token.index for token in answer.tokens] == list(range(LENGTH))
    assert breaks
    stored = await pair.second.client.get_session(session_id)
    assert list(stored.token_ids) == PROMPT + whole.ids


@pytest.mark.parametrize("sampling", [GREEDY, SEEDED], ids=["greedy", "seeded"])
async def test_a_router_that_was_away_is_refused_and_its_own_streams_go_on(
    pair: Pair, sampling: dict[str, Any]
) -> None:
    whole = await pair.second.answer(ask(LENGTH, sampling))
    sid = "p" + whole.started.session_id
    pair.pace.num_left = 10
    own = asyncio.create_task(pair.first.answer(ask(LENGTH, sampling, session_id=sid)))
    await pair.held_at(10, sid)
    pair.network.is_down = True  # for Redis the first router is paused from here on
    pair.pace.num_left = 3  # what it writes now is published and never stored
    other = await asyncio.wait_for(pair.second.resume(sid), 20)
    assert other.ids == whole.ids
    assert not own.done()
    pair.network.is_down = False
    pair.pace.num_left = None
    answer = await asyncio.wait_for(own, 20)
    assert (answer.ids, answer.text) == (whole.ids, whole.text)
    assert answer.finished is not None and answer.finished.reason == router_pb2.FINISH_REASON_LENGTH
    assert list((await pair.first.client.get_session(sid)).token_ids) == PROMPT + whole.ids


async def test_an_expert_refuses_the_fence_of_a_router_that_was_away(pair: Pair) -> None:
    """Experts learn of the takeover at once; the router that was away learns it from them before Redis is back."""
    whole = await pair.second.answer(ask(LENGTH))
    pair.pace.num_left = 10
    own = asyncio.create_task(pair.first.answer(ask(LENGTH, session_id="fence")))
    await pair.held_at(10, "fence")
    pair.network.is_down = True
    assert (await asyncio.wait_for(pair.second.resume("fence"), 20)).ids == whole.ids
    pair.pace.num_left = None
    await until(lambda: writes(pair.first) == 0, 10)
    assert not own.done()
    pair.network.is_down = False
    assert (await asyncio.wait_for(own, 20)).ids == whole.ids


async def test_what_was_published_and_is_stored_differently_ends_the_stream(pair: Pair) -> None:
    pair.pace.num_left = 5
    own = asyncio.create_task(pair.first.answer(ask(LENGTH, session_id="forked")))
    await pair.held_at(5, "forked")
    pair.network.is_down = True
    pair.pace.num_left = 3
    await until(lambda: pair.pace.num_left == 0, 10)
    store = pair.second.router.keeper.store
    await asyncio.sleep(1.2)
    lease = await store.acquire("forked", "somebody who writes something else")
    await store.append(lease, lease.length, pack_prompt([60, 60, 60]))
    await store.release(lease)
    pair.network.is_down = False
    pair.pace.num_left = None
    with pytest.raises(FusionRouteError) as caught:
        await asyncio.wait_for(own, 20)
    assert caught.value.reason is Reason.TURN_FORKED


async def test_one_request_to_both_routers_at_once_is_one_turn(pair: Pair) -> None:
    whole = await pair.second.answer(ask(20))
    for number in range(5):
        request = ask(20, session_id=f"both-{number}", request_id="r1")
        first, second = await asyncio.gather(pair.first.answer(request), pair.second.answer(request))
        assert first.ids == second.ids == whole.ids
        stored = await pair.first.client.get_session(f"both-{number}")
        assert list(stored.token_ids) == PROMPT + whole.ids


async def test_the_same_request_follows_the_turn_that_another_router_writes(pair: Pair) -> None:
    pair.pace.seconds = 0.005
    request = ask(LENGTH, session_id="again", request_id="r1")
    writing = asyncio.create_task(pair.first.answer(request))
    await until(lambda: writes(pair.first) == 1, 10)
    again = await pair.second.answer(request)
    assert again.ids == (await writing).ids
    assert len((await pair.first.client.get_session("again")).token_ids) == len(PROMPT) + LENGTH


async def test_another_request_for_a_session_that_is_written_elsewhere_is_refused(pair: Pair) -> None:
    pair.pace.num_left = 3
    writing = asyncio.create_task(pair.first.answer(ask(10, session_id="busy", request_id="r1")))
    await pair.held_at(3, "busy")
    with pytest.raises(FusionRouteError) as caught:
        await pair.second.answer(ask(10, session_id="busy", request_id="r2"))
    assert caught.value.reason is Reason.SESSION_BUSY
    pair.pace.num_left = None
    await writing


async def test_cancel_reaches_a_turn_that_another_router_writes(pair: Pair) -> None:
    pair.pace.num_left = 3
    writing = asyncio.create_task(pair.first.answer(ask(LENGTH, session_id="cancel")))
    await pair.held_at(3, "cancel")
    following = asyncio.create_task(pair.second.resume("cancel"))
    await asyncio.sleep(0.2)
    assert await pair.second.client.cancel("cancel")
    for answer in await asyncio.wait_for(asyncio.gather(writing, following), 10):
        assert answer.finished is not None
        assert answer.finished.reason == router_pb2.FINISH_REASON_CANCELLED
        assert len(answer.ids) == 3


async def test_cancel_reaches_a_turn_whose_router_is_gone(pair: Pair) -> None:
    pair.pace.num_left = 3
    writing = asyncio.create_task(pair.first.answer(ask(LENGTH, session_id="gone")))
    await pair.held_at(3, "gone")
    await pair.kill_first()
    assert await pair.second.client.cancel("gone")
    answer = await asyncio.wait_for(pair.second.resume("gone"), 10)
    assert answer.finished is not None
    assert (answer.finished.reason, len(answer.ids)) == (router_pb2.FINISH_REASON_CANCELLED, 3)
    await asyncio.gather(writing, return_exceptions=True)


async def test_delete_ends_a_turn_that_another_router_writes(pair: Pair) -> None:
    pair.pace.num_left = 3
    writing = asyncio.create_task(pair.first.answer(ask(LENGTH, session_id="delete")))
    await pair.held_at(3, "delete")
    following = asyncio.create_task(pair.second.resume("delete"))
    await asyncio.sleep(0.2)
    assert await pair.second.client.delete_session("delete")
    pair.pace.num_left = None
    for task in (following, writing):
        with pytest.raises(FusionRouteError) as caught:
            await asyncio.wait_for(task, 10)
        assert caught.value.reason is Reason.SESSION_UNKNOWN
    keys = session_keys("delete")[:3]
    assert await pair.second.router.keeper.store._client.exists(*keys) == 0


async def test_a_follower_that_nobody_listens_to_stops_and_leaves_the_writer_alone(pair: Pair) -> None:
    pair.pace.num_left = 3
    writing = asyncio.create_task(pair.first.answer(ask(10, session_id="left")))
    await pair.held_at(3, "left")
    async with aclosing(pair.second.client.resume("left")) as events:
        async for event in events:
            if event.WhichOneof("event") == "token":
                break
    keeper = pair.second.router.keeper
    assert len(keeper._tasks) == 1
    await until(lambda: not keeper._tasks, 10)
    assert writes(pair.first) == 1
    pair.pace.num_left = None
    assert len((await writing).ids) == 10


async def test_a_follower_has_only_so_much_patience_with_the_store(
    family: Family, redis_url: str, tmp_path: Path
) -> None:
    async with two_routers(family, redis_url, tmp_path, store_patience_seconds=0.5) as pair:
        store = pair.second.router.keeper.store
        lease = await store.acquire("patience", "somebody")
        await pair.second.answer(ask(LENGTH, session_id="other"))
        stored = await store.get("other")
        assert stored.turn is not None
        await store.begin_turn(lease, 0, pack_prompt(PROMPT), stored.turn.parameters, request_id="r1")
        following = asyncio.create_task(pair.first.resume("patience"))
        await until(lambda: len(pair.first.router.keeper._tasks) == 1, 10)
        pair.network.is_down = True
        with pytest.raises(FusionRouteError) as caught:
            await asyncio.wait_for(following, 20)
        assert caught.value.reason is Reason.STORE_UNAVAILABLE


async def test_a_router_with_another_checkpoint_follows_but_does_not_go_on(
    family: Family, redis_url: str, tmp_path: Path
) -> None:
    records = tuple(record_of(slot, path) for slot, path in family.experts.items())
    other = Family(save_router(tmp_path / "other", records, seed=99), family.experts)
    async with two_routers(family, redis_url, tmp_path, second={"family": other}) as pair:
        pair.pace.num_left = 3
        writing = asyncio.create_task(pair.first.answer(ask(LENGTH, session_id="other-checkpoint")))
        await pair.held_at(3, "other-checkpoint")
        following = asyncio.create_task(pair.second.resume("other-checkpoint"))
        await until(lambda: len(pair.second.router.keeper._tasks) == 1, 10)
        await pair.kill_first()
        with pytest.raises(FusionRouteError) as caught:
            await asyncio.wait_for(following, 20)
        assert caught.value.reason is Reason.CHECKPOINT_CHANGED
        await asyncio.gather(writing, return_exceptions=True)
