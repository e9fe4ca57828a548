"""Every service: errors with details, honest health, reflection, message limits, one owner to a port."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from fusionroute.errors import InvalidRequest, OutOfRoom, Reason
from fusionroute.grpc_runtime import (
    PortTaken,
    Progress,
    Service,
    channel,
    check_port_free,
    error_from_rpc,
    server,
)
from fusionroute.v1 import expert_pb2, expert_pb2_grpc

# ruff: noqa: N802 - the contract names the methods
NAME = "fusionroute.v1.ExpertService"
SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


class Stubborn(expert_pb2_grpc.ExpertServiceServicer):
    """Refuses, breaks, and answers with as many bytes as the session id says."""

    def __init__(self) -> None:
        self.cleaned_up = asyncio.Event()

    async def GetInfo(self, request: Any, context: Any) -> expert_pb2.GetInfoResponse:
        raise OutOfRoom(Reason.QUEUE_FULL, "full", metadata={"limit": "7"}, retry_after_seconds=0.25)

    async def CloseSession(self, request: Any, context: Any) -> expert_pb2.CloseSessionResponse:
        raise ValueError("the password is hunter2")

    async def Step(self, request: Any, context: Any) -> expert_pb2.StepResponse:
        response = expert_pb2.StepResponse()
        response.rows.data = b"x" * request.from_position
        return response

    async def StepBatch(self, request: Any, context: Any) -> expert_pb2.StepBatchResponse:
        raise NotImplementedError

    async def ListSessions(self, request: Any, context: Any) -> expert_pb2.ListSessionsResponse:
        raise NotImplementedError

    async def Reload(self, request: Any, context: Any) -> expert_pb2.ReloadResponse:
        raise NotImplementedError

    async def StepStream(
        self, request_iterator: Any, context: Any
    ) -> AsyncIterator[expert_pb2.StepStreamResponse]:
        try:
            async for request in request_iterator:
                if request.cancelled:
                    raise OutOfRoom(Reason.QUEUE_FULL, "in the middle")
                results = [expert_pb2.StreamedResult(id=step.id) for step in request.steps]
                yield expert_pb2.StepStreamResponse(results=results)
        finally:
            self.cleaned_up.set()

    async def Score(self, request: Any, context: Any) -> AsyncIterator[expert_pb2.ScoreResponse]:
        try:
            yield expert_pb2.ScoreResponse(from_position=3)
            if request.output == expert_pb2.SCORE_OUTPUT_ROWS:
                await asyncio.sleep(60)
            raise OutOfRoom(Reason.KV_MEMORY_FULL, "in the middle")
        finally:
            self.cleaned_up.set()


def service_of(servicer: Stubborn) -> Service:
    return Service(NAME, lambda s: expert_pb2_grpc.add_ExpertServiceServicer_to_server(servicer, s))


@pytest.fixture
async def stubborn() -> AsyncIterator[tuple[expert_pb2_grpc.ExpertServiceAsyncStub, Stubborn]]:
    servicer = Stubborn()
    async with (
        server([service_of(servicer)], max_message_bytes=100_000) as running,
        channel(running.address, max_message_bytes=100_000) as opened,
    ):
        yield expert_pb2_grpc.ExpertServiceStub(opened), servicer


async def test_an_error_of_ours_arrives_with_reason_metadata_and_hint(stubborn: Any) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stubborn[0].GetInfo(expert_pb2.GetInfoRequest())
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    error = error_from_rpc(caught.value)
    assert (error.reason, error.message, error.metadata) == (Reason.QUEUE_FULL, "full", {"limit": "7"})
    assert error.retry_after_seconds == 0.25


async def test_an_unforeseen_exception_is_logged_but_not_told(
    stubborn: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stubborn[0].CloseSession(expert_pb2.CloseSessionRequest())
    error = error_from_rpc(caught.value)
    assert error.reason is Reason.INTERNAL
    assert "ValueError" in error.message
    assert "hunter2" not in error.message
    output = "".join(capsys.readouterr())
    assert error.metadata["fault"] in output
    assert "hunter2" in output


async def test_a_stream_that_fails_in_the_middle_keeps_what_it_sent(stubborn: Any) -> None:
    received = []
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        async for response in stubborn[0].Score(expert_pb2.ScoreRequest()):
            received.append(response.from_position)
    assert received == [3]
    assert error_from_rpc(caught.value).reason is Reason.KV_MEMORY_FULL
    assert stubborn[1].cleaned_up.is_set()


async def test_a_stream_in_both_directions_fails_with_a_named_error_too(stubborn: Any) -> None:
    stream = stubborn[0].StepStream()
    await stream.write(expert_pb2.StepStreamRequest(steps=[expert_pb2.StreamedStep(id=4)]))
    assert [result.id for result in (await stream.read()).results] == [4]
    await stream.write(expert_pb2.StepStreamRequest(cancelled=[4]))
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stream.read()
    assert error_from_rpc(caught.value).reason is Reason.QUEUE_FULL
    assert stubborn[1].cleaned_up.is_set()


async def test_a_client_that_leaves_a_stream_ends_the_servicers_work(stubborn: Any) -> None:
    stream = stubborn[0].Score(expert_pb2.ScoreRequest(output=expert_pb2.SCORE_OUTPUT_ROWS))
    await stream.read()
    stream.cancel()
    await asyncio.wait_for(stubborn[1].cleaned_up.wait(), timeout=5)


async def test_an_answer_too_large_names_the_setting(stubborn: Any) -> None:
    assert len((await stubborn[0].Step(expert_pb2.StepRequest(from_position=90_000))).rows.data) == 90_000
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stubborn[0].Step(expert_pb2.StepRequest(from_position=100_001))
    error = error_from_rpc(caught.value)
    assert isinstance(error, InvalidRequest)
    assert "max_message_bytes" in error.message


async def test_a_request_too_large_names_the_setting(stubborn: Any) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stubborn[0].Step(expert_pb2.StepRequest(session_id="x" * 100_001))
    assert "max_message_bytes" in error_from_rpc(caught.value).message


@pytest.mark.parametrize(("server_limit", "client_limit"), [(100_000, 900_000), (900_000, 100_000)])
async def test_each_end_keeps_its_own_message_limit(server_limit: int, client_limit: int) -> None:
    async with (
        server([service_of(Stubborn())], max_message_bytes=server_limit) as running,
        channel(running.address, max_message_bytes=client_limit) as opened,
    ):
        stub = expert_pb2_grpc.ExpertServiceStub(opened)
        for request in (
            expert_pb2.StepRequest(from_position=200_000),
            expert_pb2.StepRequest(session_id="x" * 200_000),
        ):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await stub.Step(request)
            assert "max_message_bytes" in error_from_rpc(caught.value).message


async def test_a_taken_port_is_named() -> None:
    async with server([]) as first:
        with pytest.raises(PortTaken, match=f"127.0.0.1:{first.port}"):
            async with server([], port=first.port):
                pass
        with pytest.raises(PortTaken, match=f"127.0.0.1:{first.port}"):
            check_port_free("127.0.0.1", first.port)
    check_port_free("127.0.0.1", first.port)


async def test_a_port_is_free_again_once_its_server_has_stopped() -> None:
    async with server([]) as first:
        pass
    async with server([], port=first.port) as second:
        assert second.port == first.port


async def test_reflection_lists_the_services() -> None:
    async with server([service_of(Stubborn())]) as running, channel(running.address) as opened:
        stub = reflection_pb2_grpc.ServerReflectionStub(opened)
        request = reflection_pb2.ServerReflectionRequest(list_services="")
        call = stub.ServerReflectionInfo(iter([request]))
        answer = await call.read()
        names = {service.name for service in answer.list_services_response.service}
        assert {NAME, "grpc.health.v1.Health"} <= names


async def ask_health(stub: health_pb2_grpc.HealthStub, service: str) -> int:
    return int((await stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=5)).status)


async def health_turns(stub: health_pb2_grpc.HealthStub, status: int) -> None:
    async with asyncio.timeout(5):
        while await ask_health(stub, NAME) != status:
            await asyncio.sleep(0.02)


async def test_health_follows_progress_and_recovers() -> None:
    pulse = Progress(pending=False, tick=1)
    async with (
        server([service_of(Stubborn())], progress=lambda: pulse, frozen_after_seconds=0.2) as running,
        channel(running.address) as opened,
    ):
        stub = health_pb2_grpc.HealthStub(opened)
        await asyncio.sleep(0.4)
        assert await ask_health(stub, NAME) == SERVING
        pulse = Progress(pending=True, tick=1)
        await health_turns(stub, NOT_SERVING)
        assert await ask_health(stub, "") == NOT_SERVING
        pulse = Progress(pending=True, tick=2)
        await health_turns(stub, SERVING)


async def test_a_draining_service_is_not_serving_though_it_still_answers() -> None:
    async with server([service_of(Stubborn())]) as running, channel(running.address) as opened:
        stub = health_pb2_grpc.HealthStub(opened)
        await running.begin_drain()
        assert await ask_health(stub, NAME) == NOT_SERVING
        assert await ask_health(stub, "") == NOT_SERVING
