"""Steps on a stream: each is answered exactly once, as the same step alone would be."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
import pytest

from expert_service.step_stream import MAX_UNANSWERED_STEPS
from fusionroute.engine import Closing
from fusionroute.errors import Reason
from fusionroute.grpc_runtime import channel, error_from_rpc
from fusionroute.v1 import expert_pb2
from tests.expert_fakes import KnownEngine, served_expert, until
from tests.step_streams import (
    Caller,
    Message,
    Streamed,
    calling,
    step,
)


@pytest.fixture
def engine() -> KnownEngine:
    return KnownEngine()


async def test_a_streamed_step_is_answered_as_the_same_step_alone(engine: KnownEngine) -> None:
    requests = [step("a"), step("b", num_rows=2, draft_tokens=2), step("c", num_rows=0, row_indices=[0])]
    async with served_expert(engine) as (stub, _, _):
        caller = Caller(stub)
        await caller.send(*(Streamed(id=number, step=each) for number, each in enumerate(requests)))
        await caller.receive(0, 1, 2)
        for number, request in enumerate(requests):
            request.session_id += "-alone"
            alone = await stub.Step(request)
            streamed = caller.answers[number].response
            assert streamed.rows == alone.rows
            assert (streamed.position, streamed.drafted_ids) == (alone.position, alone.drafted_ids)
        await caller.call.done_writing()
        assert await caller.call.read() is grpc.aio.EOF


async def test_what_ends_together_comes_together(engine: KnownEngine) -> None:
    engine.gate.clear()
    async with calling(engine) as caller:
        await caller.send(*(Streamed(id=number, step=step(f"s{number}")) for number in range(20)))
        await caller.receive()
        await until(lambda: engine.num_waiting == 20)
        engine.gate.set()
        await caller.receive(*range(20))
        assert len([message for message in caller.messages if message.results]) <= 2


async def test_a_failed_step_names_its_error_and_hinders_nobody(engine: KnownEngine) -> None:
    async with calling(engine) as caller:
        await caller.send(
            Streamed(id=1, step=step("a b")),
            Streamed(id=2, step=step("s", from_position=7)),
            Streamed(id=3, step=step("t")),
            Streamed(id=4, step=step("u"), timeout_seconds=float("nan")),
            Streamed(id=5, step=step("v", draft_tokens=1, draft_choice={"min_p": 2.0})),
        )
        await caller.receive(1, 2, 3, 4, 5)
        assert caller.error(1).metadata["field"] == "session_id"
        assert caller.error(2).reason is Reason.SESSION_UNKNOWN
        assert caller.answers[3].HasField("response")
        assert caller.error(4).metadata["field"] == "timeout_seconds"
        assert caller.error(5).metadata["field"] == "draft_choice.min_p"


async def test_cancelled_and_late_steps_are_answered_once_and_leave_the_engine(engine: KnownEngine) -> None:
    engine.gate.clear()
    async with calling(engine) as caller:
        await caller.send(
            Streamed(id=1, step=step("a")), Streamed(id=2, step=step("b"), timeout_seconds=0.05)
        )
        await until(lambda: engine.num_waiting == 2)
        await caller.send(cancelled=(1, 99))
        await caller.receive(1, 2)
        assert caller.answers[1].error.code == grpc.StatusCode.CANCELLED.value[0]
        assert caller.error(2).reason is Reason.DEADLINE_PASSED
        await until(lambda: engine.num_waiting == 0)


async def test_sessions_that_are_closed_on_a_stream_are_forgotten_without_an_answer(
    engine: KnownEngine,
) -> None:
    close = expert_pb2.CloseSessionRequest
    async with calling(engine) as caller:
        await caller.send(Streamed(id=1, step=step("a")), Streamed(id=2, step=step("b")))
        await caller.receive(1, 2)
        await caller.send(
            Streamed(id=3, step=step("c")),
            closings=(close(session_id="a", fence=4, may_share=True), close(session_id="unknown")),
        )
        await caller.receive(3)
        assert engine.let_go_of == [Closing("a", 4), Closing("unknown", 0, for_good=True)]
        assert engine.lengths.keys() == {"b", "c"}
        assert caller.answers.keys() == {1, 2, 3}


async def test_a_stream_that_breaks_cancels_its_steps(engine: KnownEngine) -> None:
    engine.gate.clear()
    async with calling(engine) as caller:
        await caller.send(Streamed(id=1, step=step()))
        await until(lambda: engine.num_waiting == 1)
        caller.call.cancel()
        await until(lambda: engine.num_waiting == 0)


async def test_too_many_unanswered_steps_are_refused(engine: KnownEngine) -> None:
    engine.gate.clear()
    async with calling(engine) as caller:
        for first in range(0, MAX_UNANSWERED_STEPS + 1, 205):
            await caller.send(*(Streamed(id=n, step=step(f"s{n}")) for n in range(first, first + 205)))
        refused = range(MAX_UNANSWERED_STEPS, MAX_UNANSWERED_STEPS + 1)
        await caller.receive(*refused)
        assert {caller.error(number).reason for number in refused} == {Reason.QUEUE_FULL}
        engine.gate.set()
        await caller.receive(*range(MAX_UNANSWERED_STEPS))


@pytest.mark.parametrize(
    ("message", "field"),
    [
        (b"\xff\xff\xff", "request"),
        (Message(steps=[Streamed(id=1, step=step()), Streamed(id=1, step=step("t"))]), "id"),
        (Message(steps=[Streamed(id=number) for number in range(257)]), "steps"),
        (Message(cancelled=range(5000)), "cancelled"),
        (Message(closings=[expert_pb2.CloseSessionRequest(session_id="s")] * 5000), "closings"),
        (Message(closings=[expert_pb2.CloseSessionRequest(session_id="no name")]), "session_id"),
    ],
)
async def test_a_message_that_is_none_ends_the_stream_with_its_name(
    engine: KnownEngine, message: Any, field: str
) -> None:
    async with served_expert(engine) as (_, running, _), channel(running.address) as opened:
        raw: Any = opened.stream_stream("/fusionroute.v1.ExpertService/StepStream")()
        await raw.write(message if isinstance(message, bytes) else message.SerializeToString())
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            async for _ in raw:
                pass
        error = error_from_rpc(caught.value)
        assert (error.reason, error.metadata["field"]) == (Reason.INVALID_FIELD, field)


async def test_a_server_that_stops_lets_a_quiet_stream_end_at_once(engine: KnownEngine) -> None:
    async with served_expert(engine) as (stub, running, _):
        caller = Caller(stub)
        await caller.send(Streamed(id=1, step=step()))
        await caller.receive(1)
        engine.gate.clear()
        await caller.send(Streamed(id=2, step=step("t")))
        await until(lambda: engine.num_waiting == 1)
        stopping = asyncio.ensure_future(running.stop(30))
        await asyncio.sleep(0.05)
        assert not stopping.done(), "a step runs"
        engine.gate.set()
        await caller.receive(2)
        assert await caller.call.read() is grpc.aio.EOF
        async with asyncio.timeout(5):
            await stopping
