"""Messages of one host over a socket of their own: the same answers, and the stream's end is the line's."""

from __future__ import annotations

import asyncio
import random
import secrets
import socket
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import numpy as np
import pytest

from fusionroute.engine import StepCall
from fusionroute.errors import FusionRouteError, Reason
from fusionroute.grpc_runtime import channel
from fusionroute.local_line import PREFIX, LineListener, LineRefused, MessageLine, connect_line
from fusionroute.v1 import common_pb2, expert_pb2_grpc, registry_pb2
from router_service.instances import Instance
from tests.expert_fakes import WIDTH, KnownEngine, served_expert, until

MOST_BYTES = 1 << 20


def soon() -> float:
    return time.monotonic() + 10


@asynccontextmanager
async def instance_at(address: str, memory_bytes: int = 4096) -> AsyncIterator[Instance]:
    model = common_pb2.ModelIdentity(logits_width=WIDTH, epoch=5)
    async with channel(address) as opened:
        entry = registry_pb2.ExpertEntry(instance_id="i", address=address, model=model)
        stub = expert_pb2_grpc.ExpertServiceStub(opened)
        instance = Instance(entry, opened, stub, memory_bytes=memory_bytes, has_socket=True)
        yield instance
        await instance.close()


def line_of(instance: Instance) -> MessageLine | None:
    stream: Any = instance.line._stream
    line: MessageLine | None = None if stream is None else stream._line
    return line


async def lined(instance: Instance) -> MessageLine:
    """Steps until messages go over a line."""
    async with asyncio.timeout(10):
        number = 0
        while (line := line_of(instance)) is None:
            number += 1
            await instance.step(StepCall(f"warm-{number}", 0, [3], 1), soon())
    return line


@asynccontextmanager
async def pair(proof: bytes = b"p" * 32) -> AsyncIterator[tuple[MessageLine, MessageLine]]:
    listener = LineListener()
    accepting = asyncio.create_task(listener.accept(proof, MOST_BYTES))
    ours = await connect_line(listener.address, proof, MOST_BYTES)
    theirs = await accepting
    listener.close()
    yield ours, theirs
    ours.close()
    theirs.close()


async def test_steps_over_a_line_are_answered_as_those_over_the_stream() -> None:
    engine = KnownEngine()
    async with served_expert(engine) as (_, running, _), instance_at(running.address) as instance:
        over_stream = await instance.step(StepCall("a", 0, [3, 4, 5], 2), soon())
        await lined(instance)
        answers = await asyncio.gather(
            *(instance.step(StepCall(f"s{n}", 0, [3, 4, 5], 2), soon()) for n in range(20))
        )
        for answer in answers:
            np.testing.assert_array_equal(answer.rows, over_stream.rows)
        with pytest.raises(FusionRouteError) as refused:
            await instance.step(StepCall("b", 7, [3], 1), soon())
        assert refused.value.reason is Reason.SESSION_UNKNOWN


async def test_all_steps_of_one_turn_of_the_loop_are_one_message_and_a_cancelled_one_leaves_the_engine() -> None:
    engine = KnownEngine()
    async with served_expert(engine) as (_, running, _), instance_at(running.address) as instance:
        line = await lined(instance)
        sent: list[bytes] = []
        send = line.send

        def noted(message: bytes) -> None:
            sent.append(message)
            send(message)

        line.send = noted  # type: ignore[method-assign]
        engine.gate.clear()
        steps = [
            asyncio.create_task(instance.step(StepCall(f"s{n}", 0, [3], 1), soon())) for n in range(5)
        ]
        await until(lambda: engine.num_waiting == 5)
        assert len(sent) == 1
        steps[2].cancel()
        await until(lambda: engine.num_waiting == 4)
        engine.gate.set()
        assert [len((await step).rows) for step in steps if step is not steps[2]] == [1] * 4


@pytest.mark.parametrize("side", ["router", "expert"])
async def test_a_line_that_breaks_fails_its_steps_and_the_next_one_goes_over_a_new_stream(side: str) -> None:
    engine = KnownEngine()
    async with served_expert(engine) as (_, running, servicer), instance_at(running.address) as instance:
        line = await lined(instance)
        engine.gate.clear()
        waiting = asyncio.create_task(instance.step(StepCall("s", 0, [3], 1), soon()))
        await until(lambda: engine.num_waiting == 1)
        streams: Any = servicer._streams
        broken = line if side == "router" else next(each._line for each in streams if each._line is not None)
        assert broken._transport is not None
        broken._transport.abort()
        with pytest.raises(FusionRouteError) as lost:
            await waiting
        assert lost.value.reason is Reason.EXPERT_UNAVAILABLE
        await until(lambda: engine.num_waiting == 0)
        engine.gate.set()
        assert len((await instance.step(StepCall("t", 0, [3], 1), soon())).rows) == 1
        assert await lined(instance) is not line


async def test_a_message_that_is_none_ends_the_stream() -> None:
    engine = KnownEngine()
    async with served_expert(engine) as (_, running, _), instance_at(running.address) as instance:
        line = await lined(instance)
        line.send(b"\xff\xff\xff")
        await until(lambda: line_of(instance) is not line or not line.is_open)
        assert len((await instance.step(StepCall("t", 0, [3], 1), soon())).rows) == 1


async def test_without_shared_memory_there_is_no_line() -> None:
    engine = KnownEngine()
    async with served_expert(engine) as (_, running, _), instance_at(running.address, 0) as instance:
        for number in range(50):
            await instance.step(StepCall(f"s{number}", 0, [3], 1), soon())
        assert line_of(instance) is None


async def test_messages_arrive_whole_and_in_order_however_they_are_cut() -> None:
    rng = random.Random(4)
    messages = [rng.randbytes(rng.choice([0, 1, 3, 4, 5, 100, 70_000])) for _ in range(200)]
    arrived: list[bytes] = []
    line = MessageLine(MOST_BYTES)
    line.listen(arrived.append, list)
    stream = b"".join(len(each).to_bytes(4, "little") + each for each in messages)
    while stream:
        count = rng.choice([1, 2, 3, 7, 4096, 100_000])
        line.data_received(stream[:count])
        stream = stream[count:]
    assert arrived == messages


async def test_both_ends_hear_each_other_and_the_end() -> None:
    async with pair() as (ours, theirs):
        heard: list[bytes] = []
        ends: list[str] = []
        for size in (0, 10):
            ours.send(b"x" * size)
        await asyncio.sleep(0.05)  # what has come before anybody listens is not lost
        theirs.listen(heard.append, lambda: ends.append("lost"))
        ours.send(b"x" * 300_000)
        await until(lambda: len(heard) == 3)
        assert [len(each) for each in heard] == [0, 10, 300_000]
        ours.close()
        await until(lambda: ends == ["lost"])


async def test_a_message_that_is_too_long_ends_the_line() -> None:
    async with pair() as (ours, theirs):
        ends: list[str] = []
        ours.listen(lambda message: None, lambda: ends.append("lost"))
        ours.send(b"x" * (MOST_BYTES + 1))
        await until(lambda: ends == ["lost"])
        assert not theirs.is_open


async def test_who_does_not_show_the_proof_is_not_taken_for_the_service() -> None:
    listener, proof = LineListener(), secrets.token_bytes(32)
    accepting = asyncio.create_task(listener.accept(proof, MOST_BYTES))
    stranger = await connect_line(listener.address, secrets.token_bytes(32), MOST_BYTES)
    await until(lambda: not stranger.is_open)
    assert not accepting.done()
    service = await connect_line(listener.address, proof, MOST_BYTES)
    assert (await accepting).is_open
    listener.close()
    service.close()


@pytest.mark.parametrize("address", ["", "somewhere", PREFIX + "../x", PREFIX + "0" * 32])
async def test_where_nobody_waits_there_is_no_line(address: str) -> None:
    with pytest.raises(LineRefused):
        await connect_line(address, b"p" * 32, MOST_BYTES)


def test_nothing_is_left_of_a_listener_in_the_file_system_or_the_kernel() -> None:
    listener = LineListener()
    listener.close()
    with pytest.raises(ConnectionRefusedError), socket.socket(socket.AF_UNIX) as late:
        late.connect("\0" + listener.address)
