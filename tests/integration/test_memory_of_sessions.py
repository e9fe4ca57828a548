"""What abandoned sessions leave behind: nothing that only the garbage collector could free.

Objects are counted while it is switched off, so that whatever is in a cycle or still held is seen.
"""

from __future__ import annotations

import asyncio
import gc
import subprocess
import sys
import time
import weakref
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from fusionroute.engine import StepCall, load_model
from fusionroute.engine.steps import Job
from fusionroute.errors import SessionStateError, Unavailable
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
ALONE_SECONDS = 0.02
WAIT_SECONDS = 10.0
NUM_TURNS = 12
NUM_SCRIPTS = 4
"""Of Redis that turns use: to begin, to append, to end, to be put aside."""


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


async def until_gone(*types: type, but: int = 0) -> None:
    """Returns when of no type more than `but` instances are alive; fails with what still is after a while."""
    give_up = time.monotonic() + WAIT_SECONDS
    while max((alive := num_alive(*types)).values(), default=0) > but and time.monotonic() < give_up:
        await asyncio.sleep(0.1)
    assert max(alive.values(), default=0) <= but, alive


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("family")


@pytest.fixture
async def stack(folder: Path) -> AsyncIterator[Stack]:
    async with served(make_family(folder, ("math",)), alone_seconds=ALONE_SECONDS, drafting="off") as running:
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


async def test_turns_whose_streams_are_cancelled_are_gone_without_the_garbage_collector(stack: Stack) -> None:
    with without_the_collector():
        for number in range(NUM_TURNS):
            await leave(stack, number)
        assert num_alive(LiveTurn)
        # The client of Redis keeps a refusal in a cycle, such as the first one of each script, and with it its caller.
        await until_gone(*OF_A_TURN, but=NUM_SCRIPTS)
        stored = [await stack.router.keeper.store.get(f"s{number}") for number in range(NUM_TURNS)]
        num_cut_short = sum(session.length < 60 for session in stored)
        assert num_cut_short > NUM_TURNS // 2, "they must have been put aside"


async def test_a_step_that_is_refused_is_gone_without_the_garbage_collector(stack: Stack) -> None:
    engine = stack.router.engine
    with without_the_collector():
        with pytest.raises(SessionStateError, match="not cached"):
            await engine.step(StepCall("unheard-of", 3, [5], 1))
        await until_gone(Job)


async def test_an_error_that_several_followers_hear_does_not_grow(stack: Stack) -> None:
    turn = await stack.router.keeper.generate(request(9))
    async with asyncio.timeout(WAIT_SECONDS):
        while not turn.is_over:
            await asyncio.sleep(0.05)
    heard = []
    for _ in range(3):
        with pytest.raises(Unavailable, match="nobody follows") as caught:
            async for _ in turn.follow():
                pass
        heard.append(len(caught.traceback))
    assert len(set(heard)) == 1, heard
    assert turn.error is not None and turn.error.__traceback__ is None


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2"])
def test_a_model_is_freed_although_the_collector_never_looks_at_it(tmp_path: Path, family: str) -> None:
    model = load_model(str(save_tiny_model(tmp_path / family, family)))
    with without_the_collector():
        weights = weakref.ref(next(model.model.parameters()))
        del model
        assert weights() is None


def test_a_daemon_sets_aside_what_it_has_loaded_before_it_says_ready() -> None:
    daemon = """
import asyncio, gc, os, signal
from fusionroute.daemon import serve_until_signalled

class Server:
    address = "127.0.0.1:1"
    async def begin_drain(self): pass
    async def stop(self, grace_seconds): pass

async def drain(seconds):
    print("set aside", gc.get_freeze_count() > 10_000, "left", len(gc.get_objects()) < 5_000)

async def main():
    asyncio.get_running_loop().call_soon(os.kill, os.getpid(), signal.SIGTERM)
    await serve_until_signalled(Server(), drain=drain, drain_seconds=5)

asyncio.run(main())
"""
    ended = subprocess.run([sys.executable, "-c", daemon], capture_output=True, text=True, timeout=60)
    assert "set aside True left True" in ended.stdout.split("\n"), ended
