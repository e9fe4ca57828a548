"""Steps on a stream: each is answered exactly once, as the same step alone would be, and streams can be replaced."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeAlias

import grpc
import numpy as np
import pytest

from expert_service.step_stream import MAX_UNANSWERED_STEPS
from fusionroute.access_channel import AccessChannel
from fusionroute.engine import Draft, Engine, StepCall, prepare_model
from fusionroute.errors import FusionRouteError, InvalidRequest, OutOfRoom, Reason, Unavailable
from fusionroute.fusion import Sampling
from fusionroute.grpc_runtime import channel, error_from_rpc
from fusionroute.rpc_errors import was_transport
from fusionroute.streamed_rows import StreamedAnswers
from fusionroute.v1 import common_pb2, expert_pb2, expert_pb2_grpc, registry_pb2
from fusionroute.wire import step_error_from_message
from router_service.instances import Instance
from router_service.step_line import StepLine, streams_over
from tests.certificates import Authority
from tests.expert_fakes import WIDTH, KnownEngine, served_expert, successor, until
from tests.tiny_models import tiny_model, word_tokenizer

# ruff: noqa: N802 - the contract names the methods
Streamed: TypeAlias = expert_pb2.StreamedStep
Message: TypeAlias = expert_pb2.StepStreamRequest


def step(session_id: str = "s", **changes: Any) -> expert_pb2.StepRequest:
    return expert_pb2.StepRequest(
        **({"session_id": session_id, "token_ids": [3, 4], "num_rows": 1} | changes)
    )


class Caller:
    """The caller's end of a stream, answer by answer."""

    def __init__(self, stub: expert_pb2_grpc.ExpertServiceAsyncStub) -> None:
        self.call = stub.StepStream()
        self.answers: dict[int, expert_pb2.StepResult] = {}
        self.messages: list[expert_pb2.StepStreamResponse] = []

    async def send(self, *steps: Streamed, cancelled: tuple[int, ...] = ()) -> None:
        await self.call.write(Message(steps=steps, cancelled=cancelled))

    async def receive(self, *step_ids: int) -> None:
        """Reads until these are answered; an answer that comes twice is an error."""
        async with asyncio.timeout(10):
            while not self.answers.keys() >= set(step_ids):
                message = await self.call.read()
                assert isinstance(message, expert_pb2.StepStreamResponse), "the stream has ended"
                self.messages.append(message)
                for result in message.results:
                    assert result.id not in self.answers
                    self.answers[result.id] = result.result

    def error(self, step_id: int) -> FusionRouteError:
        assert self.answers[step_id].WhichOneof("result") == "error"
        return step_error_from_message(self.answers[step_id].error)


@pytest.fixture
def engine() -> KnownEngine:
    return KnownEngine()


@asynccontextmanager
async def calling(engine: KnownEngine, **options: Any) -> AsyncIterator[Caller]:
    async with served_expert(engine, **options) as (stub, _, _):
        caller = Caller(stub)
        yield caller
        caller.call.cancel()


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


# --- the router's end ------------------------------------------------------------------------------------------------


def soon(seconds: float = 10.0) -> float:
    return time.monotonic() + seconds


@asynccontextmanager
async def lined(engine: KnownEngine, **options: Any) -> AsyncIterator[StepLine]:
    async with served_expert(engine) as (_, running, _), channel(running.address) as opened:
        line = StepLine(streams_over(opened), running.address, **options)
        yield line
        await line.close()


class Recorder:
    """A stub whose streams keep what is written to them and answer nothing."""

    def __init__(self) -> None:
        self.messages: list[Message] = []
        self.is_closed = asyncio.Event()
        self.may_write = asyncio.Event()
        self.may_write.set()

    def open(self) -> Any:
        return self

    async def write(self, message: Message) -> None:
        self.messages.append(message)
        await self.may_write.wait()

    async def __aiter__(self) -> AsyncIterator[StreamedAnswers]:
        await self.is_closed.wait()
        yield StreamedAnswers(False, [])

    def cancel(self) -> None:
        self.is_closed.set()


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


def call(session_id: str, **changes: Any) -> StepCall:
    return StepCall(session_id, 0, [3, 4], **({"num_rows": 1} | changes))


@asynccontextmanager
async def instance_at(address: str) -> AsyncIterator[Instance]:
    entry = registry_pb2.ExpertEntry(
        instance_id="i", address=address, model=common_pb2.ModelIdentity(logits_width=WIDTH, epoch=5)
    )
    opened = channel(address)
    instance = Instance(entry, opened, expert_pb2_grpc.ExpertServiceStub(opened))
    yield instance
    await instance.close()


async def test_drafts_row_indices_and_exactness_reach_the_engine(engine: KnownEngine) -> None:
    draft = Draft(2, Sampling(temperature=0.5, top_k=7, top_p=0.75, min_p=0.25, seed=9), 0.125)
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
