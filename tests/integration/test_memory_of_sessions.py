"""What abandoned sessions leave behind: nothing that only the garbage collector could free.

Objects are counted while it is switched off, so that whatever is in a cycle or still held is seen.
"""

from __future__ import annotations

import asyncio
import gc
import subprocess
import sys
import weakref
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc
import pytest

from fusionroute.engine import StepCall, load_model
from fusionroute.engine.steps import Job
from fusionroute.errors import SessionStateError
from fusionroute.grpc_runtime import channel
from fusionroute.v1 import router_pb2, router_pb2_grpc
from router_service.generation import TurnWriter
from router_service.live_turn import LiveTurn
from router_service.session_text import Text
from router_service.token_log import TokenLog
from router_service.turn_runner import Draft, TurnRunner
from tests.served_stack import Stack, make_family, served
from tests.tiny_models import save_tiny_model

OF_A_TURN = (LiveTurn, TurnRunner, TurnWriter, TokenLog, Text, Draft)
ALONE_SECONDS = 0.05
WAIT_SECONDS = 20.0


@contextmanager
def without_the_collector() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def num_alive(*types: type) -> dict[str, int]:
    """Instances by type; those with `__slots__` and no weak references are among them."""
    counts = dict.fromkeys((each.__name__ for each in types), 0)
    for each in gc.get_objects():
        if type(each) in types:
            counts[type(each).__name__] += 1
    return {name: count for name, count in counts.items() if count}


async def until_gone(*types: type) -> None:
    """Returns when no instance is alive; fails with those that are, late."""
    async with asyncio.timeout(WAIT_SECONDS):
        while num_alive(*types):
            await asyncio.sleep(0.1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("family")


@pytest.fixture
async def stack(folder: Path) -> AsyncIterator[Stack]:
    async with served(make_family(folder, ("math",)), alone_seconds=ALONE_SECONDS) as running:
        yield running


def request(number: int) -> router_pb2.GenerateRequest:
    sampling = router_pb2.SamplingParameters(max_tokens=60, ignore_eos=True)
    return router_pb2.GenerateRequest(
        session_id=f"s{number}", token_ids=router_pb2.TokenIds(ids=[2 + number]), sampling=sampling
    )


async def leave(stack: Stack, number: int) -> None:
    """Begins a turn, and cancels its stream at the first token."""
    async with channel(stack.router.server.address) as connection:
        call = router_pb2_grpc.RouterServiceStub(connection).Generate(request(number))
        async for response in call:
            if response.event.HasField("token"):
                call.cancel()
                break
        with pytest.raises(asyncio.CancelledError):
            await call.code() and await call.read()


async def test_turns_whose_streams_are_cancelled_are_gone_without_the_garbage_collector(stack: Stack) -> None:
    with without_the_collector():
        for number in range(4):
            await leave(stack, number)
        assert num_alive(LiveTurn)
        await until_gone(*OF_A_TURN)
        stored = [await stack.router.keeper.store.get(f"s{number}") for number in range(4)]
        assert all(0 < session.length < 60 for session in stored), "they must have been put aside"
