"""The router's end of a stream of steps: what is sent, given up and cancelled, and how streams are replaced."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import grpc
import pytest

from fusionroute.access_channel import AccessChannel
from fusionroute.errors import Reason, Unavailable
from fusionroute.grpc_runtime import channel
from fusionroute.rpc_errors import was_transport
from router_service.step_line import StepLine, streams_over
from tests.certificates import Authority
from tests.expert_fakes import KnownEngine, served_expert, until
from tests.step_streams import (
    Recorder,
    Streamed,
    calling,
    lined,
    soon,
    step,
)


@pytest.fixture
def engine() -> KnownEngine:
    return KnownEngine()


async def test_steps_of_one_turn_of_the_loop_go_out_in_one_message() -> None:
    stub = Recorder()
    line = StepLine(stub.open, "nobody")
    for turn in range(2):
        tasks = [asyncio.create_task(line.step(step(f"s{turn}-{n}"), soon())) for n in range(30)]
        await until(lambda: sum(len(message.steps) for message in stub.messages) == 30)
        assert len(stub.messages) == 1
        for task in tasks:
            task.cancel()
        await until(lambda: len(stub.messages) == 2)
        assert [len(message.cancelled) for message in stub.messages] == [0, 30]
        stub.messages.clear()
    await line.close()


async def test_nobody_waits_longer_than_the_deadline_and_the_expert_hears_of_it(engine: KnownEngine) -> None:
    engine.gate.clear()
    async with lined(engine) as line:
        await asyncio.sleep(0)
        with pytest.raises(Unavailable) as caught:
            await line.step(step(), soon(0.05))
        assert caught.value.reason is Reason.DEADLINE_PASSED and was_transport(caught.value)
        waiting = asyncio.create_task(line.step(step("t"), soon()))
        await until(lambda: engine.num_waiting == 1)
        waiting.cancel()
        await until(lambda: engine.num_waiting == 0)
        assert waiting.cancelled() or waiting.cancelling()


async def test_what_is_cancelled_before_it_was_sent_is_never_sent() -> None:
    stub = Recorder()
    stub.may_write.clear()
    line = StepLine(stub.open, "nobody")
    tasks = [asyncio.create_task(line.step(step(f"s{n}"), soon())) for n in range(600)]
    await until(lambda: bool(stub.messages))
    num_sent = len(stub.messages[0].steps)
    for task in tasks[:500]:
        task.cancel()
    await asyncio.gather(*tasks[:500], return_exceptions=True)
    stub.may_write.set()
    await until(lambda: sum(len(message.steps) for message in stub.messages) >= num_sent + 100)
    assert num_sent < 500
    assert sum(len(message.steps) for message in stub.messages) == num_sent + 100
    assert sorted(each for message in stub.messages for each in message.cancelled) == [
        *range(1, num_sent + 1)
    ]
    await line.close()
    await asyncio.gather(*tasks, return_exceptions=True)


async def test_a_step_that_is_cancelled_in_its_own_message_is_given_up(engine: KnownEngine) -> None:
    engine.gate.clear()
    async with calling(engine) as caller:
        await caller.send(Streamed(id=1, step=step()), cancelled=(1,))
        await caller.receive(1)
        assert caller.answers[1].error.code == grpc.StatusCode.CANCELLED.value[0]


async def test_a_storm_of_cancellations_leaves_nothing_behind(engine: KnownEngine) -> None:
    engine.gate.clear()
    async with lined(engine) as line:
        for _ in range(5):
            tasks = [asyncio.create_task(line.step(step(f"s{n}"), soon())) for n in range(100)]
            await asyncio.sleep(0.01)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        stream: Any = line._stream
        await until(lambda: not stream._waiting and engine.num_waiting == 0)
        engine.gate.set()
        assert (await line.step(step("after"), soon())).response.position == 2


async def test_a_stream_that_ended_is_replaced_and_its_steps_fail_as_unavailable(engine: KnownEngine) -> None:
    async with lined(engine) as line:
        await line.step(step(), soon())
        first: Any = line._stream
        engine.gate.clear()
        waiting = asyncio.create_task(line.step(step("t"), soon()))
        await until(lambda: engine.num_waiting == 1)
        first._call.cancel()
        with pytest.raises(Unavailable) as caught:
            await waiting
        assert caught.value.reason is Reason.EXPERT_UNAVAILABLE
        engine.gate.set()
        assert (await line.step(step("u"), soon())).response.position == 2
        assert line._stream is not first


async def test_an_old_stream_is_replaced_and_ends_when_its_steps_are_answered(engine: KnownEngine) -> None:
    engine.gate.clear()
    async with lined(engine, max_stream_seconds=0.0) as line:
        first = asyncio.create_task(line.step(step("a"), soon()))
        await until(lambda: engine.num_waiting == 1)
        old: Any = line._stream
        second = asyncio.create_task(line.step(step("b"), soon()))
        await until(lambda: engine.num_waiting == 2)
        assert line._stream is not old
        engine.gate.set()
        assert [(await each).response.position for each in (first, second)] == [2, 2]
        await until(lambda: old._call.done())
        assert await old._call.code() is grpc.StatusCode.OK
        await until(lambda: not line._retired)


async def test_new_certificates_hold_from_the_next_stream_on(engine: KnownEngine, tmp_path: Path) -> None:
    authority = Authority(tmp_path / "authority")
    client = authority.client()
    async with (
        served_expert(engine, access=authority.server()) as (_, running, _),
        channel(running.address, access=client) as opened,
    ):
        line = StepLine(streams_over(opened), running.address, max_stream_seconds=0.0)
        await line.step(step("a"), soon())
        assert isinstance(opened, AccessChannel)
        before, generation = opened.current(), client.generation()
        authority.issue("client")
        await until(lambda: client.generation() != generation, 20)
        engine.gate.clear()
        over_old = asyncio.create_task(line.step(step("b"), soon()))
        await until(lambda: engine.num_waiting == 1)
        assert opened.current() is not before
        engine.gate.set()
        assert (
            (await over_old).response.position == (await line.step(step("c"), soon())).response.position == 2
        )
        await line.close()


async def test_closing_fails_the_steps_that_wait(engine: KnownEngine) -> None:
    engine.gate.clear()
    async with lined(engine) as line:
        waiting = asyncio.create_task(line.step(step(), soon()))
        await until(lambda: engine.num_waiting == 1)
        await line.close()
        with pytest.raises(Unavailable, match="was closed"):
            await waiting
        await until(lambda: engine.num_waiting == 0)
