"""Rows through shared memory: the same as in messages, places given again in time, nothing left behind."""

from __future__ import annotations

import asyncio
import fcntl
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fusionroute import shared_memory
from fusionroute.engine import StepCall
from fusionroute.grpc_runtime import channel
from fusionroute.shared_memory import FOLDER, PREFIX, MemoryRefused, RowMemory, open_memory, remove_abandoned
from fusionroute.streamed_rows import StreamedAnswer
from fusionroute.v1 import common_pb2, expert_pb2, expert_pb2_grpc, registry_pb2
from fusionroute.wire import SharedPlace
from router_service.instances import Instance
from router_service.step_line import StepLine, streams_over
from tests.expert_fakes import WIDTH, KnownEngine, served_expert, until

ROW_BYTES = WIDTH * 4


def names() -> list[str]:
    """Memories that can be found."""
    return [path.name for path in FOLDER.glob(PREFIX + "*")]


@pytest.fixture
def memory() -> Iterator[RowMemory]:
    made = RowMemory(4096)
    made.publish()
    yield made
    made.unlink()


def soon() -> float:
    return time.monotonic() + 10


@asynccontextmanager
async def instance_at(address: str, num_rows: int = 4) -> AsyncIterator[Instance]:
    """An instance whose rows come through shared memory, although they are small."""
    model = common_pb2.ModelIdentity(logits_width=WIDTH, epoch=5)
    opened = channel(address)
    instance = Instance(
        registry_pb2.ExpertEntry(instance_id="i", address=address, model=model),
        opened,
        expert_pb2_grpc.ExpertServiceStub(opened),
    )
    instance.least_shared_bytes = 0
    instance.line = StepLine(streams_over(opened), address, memory_bytes=num_rows * 64)
    yield instance
    await instance.close()


async def shares(instance: Instance) -> Any:
    """Steps until rows come through shared memory; the memory."""
    async with asyncio.timeout(10):
        for number in range(10_000):
            await instance.step(StepCall(f"warm-{number}", 0, [3], 1), soon())
            stream: Any = instance.line._stream
            if stream._memory is not None:
                return stream._memory
    raise AssertionError


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
async def test_shared_memory_equals_message(dtype: str) -> None:
    engine = KnownEngine(dtype)
    async with served_expert(engine) as (_, running, _), instance_at(running.address, 64) as instance:
        by_message = await instance.step(StepCall("a", 0, [3, 4, 5], 2), soon())
        await shares(instance)
        for row_indices in ((), (0, 2)):
            call = StepCall("b", 0, [3, 4, 5], 0 if row_indices else 2, row_indices=row_indices)
            answer = await instance.step(call, soon())
            wanted = [[3, 4, 5][index] for index in row_indices or (1, 2)]
            np.testing.assert_array_equal(answer.rows, engine.rows(wanted).float().numpy())
            assert not answer.rows.flags.owndata and not answer.rows.flags.writeable
            base: Any = answer.rows
            while isinstance(base, np.ndarray):
                base = base.base
            assert not isinstance(base, bytes), "read where they stand"
    assert by_message.rows.shape == (2, WIDTH)
    assert names() == []


async def test_a_place_is_given_again_only_when_its_rows_are_not_referred_to_any_more() -> None:
    engine = KnownEngine()
    async with served_expert(engine) as (_, running, _), instance_at(running.address, 2) as instance:
        memory = await shares(instance)
        held = [await instance.step(StepCall(f"s{n}", 0, [n], 1), soon()) for n in range(5)]
        for number, answer in enumerate(held):  # the first two fill the memory, the others came in messages
            np.testing.assert_array_equal(answer.rows, engine.rows([number]).numpy())
        rest = held[0].rows[0, 3:]
        held.clear()
        for number in range(6):
            await instance.step(StepCall(f"t{number}", 0, [number], 1), soon())
        np.testing.assert_array_equal(rest, engine.rows([0])[0, 3:].numpy())
        assert memory.place(2 * 64) is None
        del rest
        assert memory.place(2 * 64) is not None


async def test_the_place_of_a_step_that_was_given_up_stays_the_experts_until_it_has_let_go() -> None:
    engine = KnownEngine()
    async with served_expert(engine) as (_, running, _), instance_at(running.address, 1) as instance:
        memory = await shares(instance)
        engine.gate.clear()
        waiting = asyncio.create_task(instance.step(StepCall("s", 0, [3], 1), soon()))
        await until(lambda: engine.num_waiting == 1)
        waiting.cancel()
        await asyncio.sleep(0)
        assert memory.place(ROW_BYTES) is None
        await until(lambda: engine.num_waiting == 0)
        async with asyncio.timeout(5):
            while (place := memory.place(ROW_BYTES)) is None:
                await asyncio.sleep(0.01)
        place.give_back()
        engine.gate.set()


async def test_an_answer_that_comes_as_its_caller_is_cancelled_gives_its_place_back() -> None:
    engine = KnownEngine()
    async with served_expert(engine) as (_, running, _), instance_at(running.address, 1) as instance:
        memory = await shares(instance)
        engine.gate.clear()
        waiting = asyncio.create_task(instance.step(StepCall("s", 0, [3], 1), soon()))
        await until(lambda: engine.num_waiting == 1)
        stream: Any = instance.line._stream
        answered = stream._answered

        def answered_and_cancelled(answer: StreamedAnswer) -> None:
            answered(answer)
            waiting.cancel()

        stream._answered = answered_and_cancelled
        engine.gate.set()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        assert memory.place(ROW_BYTES) is not None


async def test_a_broken_stream_is_replaced_at_once_and_by_one_with_a_memory_of_its_own_later() -> None:
    engine = KnownEngine()
    async with served_expert(engine) as (_, running, _), instance_at(running.address) as instance:
        memory = await shares(instance)
        stream: Any = instance.line._stream
        stream._call.cancel()
        await until(lambda: not stream.takes_steps)
        answer = await instance.step(StepCall("s", 0, [3], 1), soon())
        np.testing.assert_array_equal(answer.rows, engine.rows([3]).numpy())
        assert await shares(instance) is not memory


async def test_an_expert_elsewhere_does_not_find_it_and_sends_messages(tmp_path: Path) -> None:
    engine = KnownEngine()
    async with served_expert(engine) as (stub, _, _):
        for offer in (
            expert_pb2.SharedMemoryOffer(name=PREFIX + "0" * 32, num_bytes=4096, proof=bytes(32)),
            expert_pb2.SharedMemoryOffer(name="../etc/passwd", num_bytes=4096, proof=bytes(32)),
        ):
            call = stub.StepStream()
            step = expert_pb2.StepRequest(session_id="s", token_ids=[3], num_rows=1)
            streamed = expert_pb2.StreamedStep(id=1, step=step, shared_offset=64, shared_bytes=64)
            await call.write(expert_pb2.StepStreamRequest(shared_memory=offer, steps=[streamed]))
            hello: Any = await call.read()
            assert not hello.shared_memory_accepted
            answer: Any = hello if hello.results else await call.read()
            assert len(answer.results[0].result.response.rows.data) == ROW_BYTES
            call.cancel()


async def test_a_place_beyond_the_memory_is_refused_by_name(memory: RowMemory) -> None:
    async with served_expert(KnownEngine()) as (stub, _, _):
        call = stub.StepStream()
        offer = expert_pb2.SharedMemoryOffer(name=memory.name, num_bytes=memory.num_bytes, proof=memory.proof)
        step = expert_pb2.StepRequest(session_id="s", token_ids=[3], num_rows=1)
        places = [(memory.num_bytes, 64), (64, memory.num_bytes), (2**63, 2**63), (65, 64)]
        steps = [
            expert_pb2.StreamedStep(id=number, step=step, shared_offset=offset, shared_bytes=num_bytes)
            for number, (offset, num_bytes) in enumerate(places)
        ]
        await call.write(expert_pb2.StepStreamRequest(shared_memory=offer, steps=steps))
        fields: list[str] = []
        while len(fields) < len(places):
            message: Any = await call.read()
            fields += [result.result.error.metadata["field"] for result in message.results]
        assert set(fields) == {"shared_offset"}
        call.cancel()


def test_rows_that_do_not_fit_go_into_the_message(memory: RowMemory) -> None:
    mapped = open_memory(memory.name, memory.num_bytes, memory.proof)
    rows = torch.arange(8.0).reshape(2, 4)
    assert SharedPlace(mapped, 64, 32).pack(rows).data is None
    assert len(SharedPlace(mapped, 64, 31).pack(rows).whole().data) == 32
    assert SharedPlace(mapped, 64, 31).pack(rows, common_pb2.DTYPE_FLOAT16).matrix.shared_offset == 64


@pytest.mark.parametrize("wrong", ["size", "proof", "mode", "kind"])
def test_a_file_that_is_not_what_it_is_said_to_be_is_refused(memory: RowMemory, wrong: str) -> None:
    name, num_bytes, proof = memory.name, memory.num_bytes, memory.proof
    path = FOLDER / name
    match wrong:
        case "size":
            num_bytes += 64
        case "proof":
            proof = bytes(32)
        case "mode":
            path.chmod(0o644)
        case "kind":
            path.unlink()
            path.symlink_to("/dev/zero")
    with pytest.raises(MemoryRefused):
        open_memory(name, num_bytes, proof)


def test_a_folder_without_room_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MemoryRefused):
        RowMemory(4096, tmp_path / "missing")
    with pytest.raises(MemoryRefused, match=r"bytes left|large"):
        RowMemory(2**50)


KILLED = """
import sys, time
from fusionroute.shared_memory import RowMemory
memory = RowMemory(4096)
if sys.argv[1] == "named":
    memory.publish()
print(memory.name, flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize("state", ["nameless", "named"])
def test_who_is_killed_leaves_nothing_behind(state: str) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", KILLED, state], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        name = process.stdout.readline().strip()
        assert (FOLDER / name).exists() == (state == "named")
        remove_abandoned()
        assert (FOLDER / name).exists() == (state == "named"), "it is in use"
        process.send_signal(signal.SIGKILL)
        process.wait(10)
    remove_abandoned()
    assert name not in names()


def test_a_memory_in_use_is_locked(memory: RowMemory) -> None:
    descriptor = os.open(FOLDER / memory.name, os.O_RDONLY)
    with pytest.raises(BlockingIOError):
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.close(descriptor)


def test_places_are_joined_again() -> None:
    memory = RowMemory(1000)
    whole = memory.num_bytes - 64
    places = [memory.place(100) for _ in range(4)]
    assert memory.place(whole) is None
    for place in (places[2], places[0], places[3], places[1]):
        assert place is not None
        place.give_back()
    assert memory.place(whole) is not None
    assert shared_memory.FOLDER == FOLDER
    memory.unlink()
