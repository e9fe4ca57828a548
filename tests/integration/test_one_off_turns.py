"""Turns after which none follows: the models' memory comes back at once, the session stays a while, and no longer."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing
from pathlib import Path

import pytest
import pytest_asyncio

from fusionroute.engine import StepCall
from fusionroute.errors import FusionRouteError, InvalidRequest, Reason
from fusionroute.v1 import router_pb2
from fusionroute.v1.router_pb2 import GenerateRequest, SamplingParameters
from router_service.instances import Instance
from tests.served_stack import Stack, make_family, served

pytestmark = pytest.mark.asyncio(loop_scope="module")
PROMPT = [5 + 7 * n % 50 for n in range(24)]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def stack(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Stack]:
    folder: Path = tmp_path_factory.mktemp("family")
    async with served(make_family(folder), one_off_ttl_seconds=20.0, drafting="off") as stack:
        yield stack


def asking(session_id: str, *, one_off: bool = True, max_tokens: int = 12) -> GenerateRequest:
    sampling = SamplingParameters(max_tokens=max_tokens, ignore_eos=True)
    return GenerateRequest(
        session_id=session_id, token_ids={"ids": PROMPT}, sampling=sampling, one_off=one_off
    )


async def holders(stack: Stack, session_id: str) -> list[str]:
    """Who has a session cached."""
    engines = {"router": stack.router.engine, **stack.engines}
    return [
        name
        for name, engine in engines.items()
        if session_id in [view.session_id for view in (await engine.list_sessions(1000))[0]]
    ]


async def until_nobody_holds(stack: Stack, session_id: str) -> None:
    async with asyncio.timeout(10):
        while await holders(stack, session_id):
            await asyncio.sleep(0.01)


async def test_the_models_forget_it_and_the_answer_can_be_read_again(stack: Stack) -> None:
    kept = await stack.answer(asking("kept", one_off=False))
    assert "router" in await holders(stack, "kept")
    answer = await stack.answer(asking("once"))
    assert answer.ids == kept.ids
    await until_nobody_holds(stack, "once")
    assert (await stack.resume("once", 5)).ids == answer.ids[5:]
    assert (await stack.client.get_session("once")).expires_in_seconds <= 20.0
    assert (await stack.client.get_session("kept")).expires_in_seconds > 1000.0


async def test_it_takes_no_call_of_its_own_to_each_expert(
    stack: Stack, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def refused(*_: object, **__: object) -> None:
        raise AssertionError("there is a stream to each")

    monkeypatch.setattr(Instance, "close_session", refused)
    await stack.answer(asking("streamed"))
    assert not [task for task in asyncio.all_tasks() if task.get_name() == "close streamed"]
    await until_nobody_holds(stack, "streamed")


async def test_what_it_began_with_is_still_shared(stack: Stack) -> None:
    long = [9 + 5 * n % 41 for n in range(80)]
    request = asking("first", max_tokens=4)
    request.token_ids.ids[:] = long
    await stack.answer(request)
    await until_nobody_holds(stack, "first")
    engine = stack.router.engine
    outcome = await engine.step(StepCall("alike", 0, [*long, 7], 1))
    assert outcome.num_computed_tokens < 10
    await engine.close_session("alike")


async def test_no_further_turn_may_follow(stack: Stack) -> None:
    await stack.answer(asking("over"))
    with pytest.raises(InvalidRequest, match="its turn was one_off"):
        await stack.answer(asking("over", one_off=False))


async def test_the_same_request_again_finds_its_answer(stack: Stack) -> None:
    request = asking("again")
    request.request_id = "r1"
    answer = await stack.answer(request)
    assert (await stack.answer(request)).ids == answer.ids


async def test_a_later_turn_can_be_the_last(stack: Stack) -> None:
    await stack.answer(asking("talk", one_off=False))
    assert await holders(stack, "talk")
    await stack.answer(asking("talk", one_off=True))
    await until_nobody_holds(stack, "talk")
    assert (await stack.client.get_session("talk")).expires_in_seconds <= 20.0


async def test_a_cancelled_one_is_given_back_too(stack: Stack) -> None:
    request = asking("cancelled", max_tokens=60)
    async with aclosing(stack.client.generate(request)) as events:
        await anext(events)
        await anext(events)
        assert await stack.client.cancel("cancelled")
    await until_nobody_holds(stack, "cancelled")
    assert (await stack.client.get_session("cancelled")).expires_in_seconds <= 20.0


async def test_a_failed_one_is_given_back_and_goes_on_when_it_can(stack: Stack) -> None:
    wanted = (await stack.answer(asking("undisturbed", one_off=False))).ids
    request = asking("failed")
    request.on_expert_unavailable = router_pb2.ON_EXPERT_UNAVAILABLE_FAIL
    slots = list(stack.family.experts)
    for slot in slots:
        await stack.stop_expert(slot)
    try:
        with pytest.raises(FusionRouteError) as failed:
            await stack.answer(request)
        assert failed.value.reason is Reason.EXPERT_UNAVAILABLE
        await until_nobody_holds(stack, "failed")
    finally:
        for slot in slots:
            await stack.start_expert(slot)
    assert (await stack.resume("failed")).ids == wanted
    await until_nobody_holds(stack, "failed")
