"""RouterService over real gRPC: resuming, cancelling, further turns, deleting."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from fusionroute.errors import FusionRouteError, Reason
from fusionroute.v1 import router_pb2
from tests.router_requests import PROMPT, ask, first_token, reason_of
from tests.served_stack import SLOTS, Family, Stack, served


async def test_a_client_that_left_resumes_at_any_token(stack: Stack) -> None:
    whole = await stack.answer(ask(30))
    session_id = await first_token(stack, ask(30))
    resumed = await stack.resume(session_id, 3)
    assert resumed.ids == whole.ids[3:]
    assert [token.index for token in resumed.tokens] == list(range(3, 30))
    later = await stack.resume(session_id)
    assert [(t.id, t.text, t.expert, t.expert_epoch) for t in later.tokens] == [
        (t.id, t.text, t.expert, t.expert_epoch) for t in whole.tokens
    ]
    assert later.text == whole.text
    with pytest.raises(FusionRouteError) as caught:
        await stack.resume(session_id, 31)
    assert caught.value.reason is Reason.INVALID_FIELD


async def test_several_streams_follow_one_turn(stack: Stack) -> None:
    session_id = await first_token(stack, ask(40))
    answers = await asyncio.gather(*(stack.resume(session_id) for _ in range(4)))
    assert len({tuple(answer.ids) for answer in answers}) == 1
    assert len(answers[0].ids) == 40


async def test_a_turn_put_aside_by_a_stopped_router_is_continued_by_the_next(
    family: Family, redis_url: str
) -> None:
    async with served(family, redis_url=redis_url) as stack:
        whole = await stack.answer(ask(60, sampling={"temperature": 1.0, "seed": 5}))
        session_id = await first_token(stack, ask(60, sampling={"temperature": 1.0, "seed": 5}))
        await stack.router.keeper.drain(0.0)
    async with served(family, redis_url=redis_url) as stack:
        stored = await stack.client.get_session(session_id)
        assert stored.state == router_pb2.SESSION_STATE_RUNNING
        assert len(PROMPT) < len(stored.token_ids) < 64
        for resumed in await asyncio.gather(*(stack.resume(session_id, 0) for _ in range(8))):
            assert resumed.ids == whole.ids
            assert resumed.text == whole.text


async def test_a_turn_that_nobody_follows_is_put_aside(family: Family) -> None:
    async with served(family, alone_seconds=0.01) as stack:
        whole = await stack.answer(ask(80))
        session_id = await first_token(stack, ask(80))
        async with asyncio.timeout(10):
            while stack.router.keeper.num_running:
                await asyncio.sleep(0.01)
        stored = await stack.client.get_session(session_id)
        assert stored.state == router_pb2.SESSION_STATE_RUNNING
        assert (await stack.resume(session_id)).ids == whole.ids


async def test_cancel_ends_a_turn_and_keeps_what_was_written(stack: Stack) -> None:
    session_id = await first_token(stack, ask(90))
    assert await stack.client.cancel(session_id)
    answer = await stack.resume(session_id)
    assert answer.finished is not None
    assert answer.finished.reason == router_pb2.FINISH_REASON_CANCELLED
    stored = await stack.client.get_session(session_id)
    assert stored.state == router_pb2.SESSION_STATE_FINISHED
    assert list(stored.token_ids) == PROMPT + answer.ids
    assert not await stack.client.cancel(session_id)


async def test_cancel_interrupts_waiting_for_an_expert_that_is_gone(stack: Stack) -> None:
    for slot in SLOTS:
        await stack.stop_expert(slot)
    request = ask(5, session_id="waits")
    task = asyncio.create_task(stack.answer(request))
    async with asyncio.timeout(10):
        while not stack.router.keeper.num_running:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.2)
        assert await stack.client.cancel("waits")
        answer = await task
    assert answer.finished is not None
    assert (answer.finished.reason, answer.ids) == (router_pb2.FINISH_REASON_CANCELLED, [])


async def test_a_second_turn_computes_only_what_is_new(stack: Stack) -> None:
    first = await stack.answer(
        ask(10, session_id="talk", combine=router_pb2.COMBINE_RULE_SUM, fixed_expert="math")
    )
    engines = {"router": stack.router.engine, "math": stack.engines["math"]}
    cached = {name: await cached_length(engine, "talk") for name, engine in engines.items()}
    assert cached == {"router": 13, "math": 13}
    second = await stack.answer(
        ask(10, session_id="talk", prompt=[7, 8], combine=router_pb2.COMBINE_RULE_SUM, fixed_expert="math")
    )
    assert second.started.num_prompt_tokens == 4 + 10 + 2
    assert second.finished is not None
    assert second.finished.statistics.num_replays == 0
    whole = await stack.answer(ask(10, prompt=PROMPT + first.ids + [7, 8], fixed_expert="math"))
    assert second.ids == whole.ids
    stored = await stack.client.get_session("talk")
    assert list(stored.token_ids) == PROMPT + first.ids + [7, 8] + second.ids
    assert stored.answer_position == 16
    assert stored.answer_text == second.text


async def cached_length(engine: Any, session_id: str) -> int:
    views, _ = await engine.list_sessions(1000)
    return next(view.cached_length for view in views if view.session_id == session_id)


async def test_the_same_request_id_begins_one_turn_only(stack: Stack) -> None:
    first = await stack.answer(ask(6, session_id="once", request_id="r1"))
    again = await stack.answer(ask(6, session_id="once", request_id="r1"))
    assert again.ids == first.ids
    stored = await stack.client.get_session("once")
    assert len(stored.token_ids) == len(PROMPT) + 6
    other = await stack.answer(ask(6, session_id="once", request_id="r2"))
    assert other.started.num_prompt_tokens == len(PROMPT) + 6 + len(PROMPT)


async def test_a_session_takes_one_turn_at_a_time(stack: Stack) -> None:
    await first_token(stack, ask(90, session_id="busy"))
    reason, message = await reason_of(stack, ask(5, session_id="busy"))
    assert reason is Reason.SESSION_BUSY
    assert "busy" in message


async def test_delete_forgets_a_session_everywhere(stack: Stack) -> None:
    answer = await stack.answer(ask(6))
    session_id = answer.started.session_id
    assert await stack.client.delete_session(session_id)
    assert not await stack.client.delete_session(session_id)
    for engine in (stack.router.engine, *stack.engines.values()):
        views, _ = await engine.list_sessions(1000)
        assert session_id not in {view.session_id for view in views}
    with pytest.raises(FusionRouteError) as caught:
        await stack.client.get_session(session_id)
    assert caught.value.reason is Reason.SESSION_UNKNOWN
