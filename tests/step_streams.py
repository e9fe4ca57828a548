"""Both ends of a stream of steps, for tests: a caller answer by answer, a line, and what stands for an expert."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, TypeAlias

from fusionroute.engine import StepCall
from fusionroute.errors import FusionRouteError
from fusionroute.grpc_runtime import channel
from fusionroute.streamed_rows import StreamedAnswers
from fusionroute.v1 import common_pb2, expert_pb2, expert_pb2_grpc, registry_pb2
from fusionroute.wire import step_error_from_message
from router_service.instances import Instance
from router_service.step_line import StepLine, streams_over
from tests.expert_fakes import WIDTH, KnownEngine, served_expert

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

    async def send(
        self,
        *steps: Streamed,
        cancelled: tuple[int, ...] = (),
        closings: tuple[expert_pb2.CloseSessionRequest, ...] = (),
    ) -> None:
        await self.call.write(Message(steps=steps, cancelled=cancelled, closings=closings))

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


@asynccontextmanager
async def calling(engine: KnownEngine, **options: Any) -> AsyncIterator[Caller]:
    async with served_expert(engine, **options) as (stub, _, _):
        caller = Caller(stub)
        yield caller
        caller.call.cancel()


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
