"""One expert as the router asks it: over streams or call by call, rows or the highest logits."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import grpc
import numpy as np
import pytest

from fusionroute.engine import Draft, Engine, StepCall, prepare_model
from fusionroute.errors import InvalidRequest, OutOfRoom, Reason, Unavailable
from fusionroute.fusion import Sampling
from fusionroute.grpc_runtime import channel
from fusionroute.rpc_errors import was_transport
from fusionroute.v1 import common_pb2, expert_pb2, expert_pb2_grpc, registry_pb2
from router_service.instances import Instance
from tests.expert_fakes import WIDTH, KnownEngine, served_expert, successor
from tests.step_streams import (
    call,
    instance_at,
    soon,
)
from tests.tiny_models import tiny_model, word_tokenizer

# ruff: noqa: N802 - the contract names the methods


@pytest.fixture
def engine() -> KnownEngine:
    return KnownEngine()


class Unary(expert_pb2_grpc.ExpertServiceServicer):
    """An expert from before there were streams."""

    def __init__(self, real: Any) -> None:
        self._real = real

    async def Step(self, request: Any, context: Any) -> Any:
        return await self._real.Step(request, context)

    async def StepStream(self, request_iterator: Any, context: Any) -> Any:
        await context.abort(grpc.StatusCode.UNIMPLEMENTED, "what is that?")
        yield

    async def _not_asked(self, request: Any, context: Any) -> Any:
        raise NotImplementedError

    GetInfo = StepBatch = CloseSession = ListSessions = Reload = _not_asked

    async def Score(self, request: Any, context: Any) -> AsyncIterator[expert_pb2.ScoreResponse]:
        yield expert_pb2.ScoreResponse()


async def test_an_expert_without_streams_is_asked_call_by_call(engine: KnownEngine) -> None:
    async with served_expert(engine) as (_, _, servicer):
        server = grpc.aio.server()
        expert_pb2_grpc.add_ExpertServiceServicer_to_server(Unary(servicer), server)
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        async with instance_at(f"127.0.0.1:{port}") as instance:
            answers = await asyncio.gather(*(instance.step(call(f"s{n}"), soon()) for n in range(5)))
            assert not instance.has_streams
            for answer in [*answers, await instance.step(call("t"), soon())]:
                np.testing.assert_array_equal(answer.rows, engine.rows([4]).numpy())
        await server.stop(None)


async def test_drafts_row_indices_and_exactness_reach_the_engine(engine: KnownEngine) -> None:
    draft = Draft(
        2, Sampling(temperature=0.5, top_k=7, top_p=0.75, min_p=0.25, seed=9), 0.125, frozenset({0, 2})
    )
    asked = call("s", num_rows=0, row_indices=(0,), exact=True, draft=draft, fence=3)
    async with served_expert(engine) as (_, running, _), instance_at(running.address) as instance:
        answer = await instance.step(asked, soon())
    got = engine.calls[0]
    assert (list(got.row_indices), got.exact, got.draft, got.fence) == ([0], True, draft, 3)
    assert answer.drafted_ids == (successor(4), successor(successor(4)))
    np.testing.assert_array_equal(answer.rows, engine.rows([3, *answer.drafted_ids]).numpy())


async def test_a_step_of_very_many_tokens_goes_by_a_call_of_its_own(engine: KnownEngine) -> None:
    async with served_expert(engine) as (_, running, _), instance_at(running.address) as instance:
        with pytest.raises(InvalidRequest) as caught:
            await instance.step(StepCall("s", 0, [3] * 20_000, 1), soon())
        assert caught.value.reason is Reason.CONTEXT_FULL
        stream = instance.line._stream
        assert stream is None
        engine.errors.append(OutOfRoom(Reason.QUEUE_FULL, "full", retry_after_seconds=0.5))
        with pytest.raises(OutOfRoom) as full:
            await instance.step(call("s"), soon())
        assert full.value.retry_after_seconds == 0.5


async def test_nobody_there_is_unavailable() -> None:
    async with instance_at("127.0.0.1:1") as instance:
        with pytest.raises(Unavailable) as caught:
            await instance.step(call("s"), soon())
        assert caught.value.reason is Reason.EXPERT_UNAVAILABLE and was_transport(caught.value)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("has_streams", [True, False])
async def test_the_highest_logits_come_in_place_of_rows(dtype: str, has_streams: bool) -> None:
    engine = KnownEngine(dtype)
    async with served_expert(engine) as (_, running, _), instance_at(running.address) as instance:
        instance.has_streams = has_streams
        asked = call("s", num_rows=2, draft=Draft(1))
        short = await instance.step(asked, soon(), top_logits=4)
        whole = await instance.step(replace(asked, session_id="t"), soon())
    assert engine.calls[0].keep_rows and not engine.calls[1].keep_rows
    assert (short.rows.shape, len(short.top), whole.top) == ((0, WIDTH), 3, ())
    for row, top in zip(whole.rows, short.top, strict=True):
        np.testing.assert_array_equal(top.ids, np.lexsort((np.arange(WIDTH), -row))[:4])
        np.testing.assert_array_equal(top.logits, row[top.ids])


async def test_whole_rows_after_the_highest_logits_are_not_computed_again() -> None:
    async with (
        Engine(prepare_model(tiny_model("llama"), word_tokenizer(), name="tiny", epoch=7)) as engine,
        served_expert(engine) as (_, running, _),
    ):
        address = running.address
        width = engine.facts.logits_width
        model = common_pb2.ModelIdentity(logits_width=width)
        opened = channel(address)
        entry = registry_pb2.ExpertEntry(instance_id="i", address=address, model=model)
        instance = Instance(entry, opened, expert_pb2_grpc.ExpertServiceStub(opened))
        asked = call("s", num_rows=1)
        short = await instance.step(asked, soon(), top_logits=3)
        num_forwards = engine.load().num_forwards
        whole = await instance.step(asked, soon())
        assert engine.load().num_forwards == num_forwards
        np.testing.assert_array_equal(whole.rows[0][short.top[0].ids], short.top[0].logits)
        await instance.close()
