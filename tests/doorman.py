"""A service that says who has been let in, and callers of it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import grpc
import structlog

from fusionroute.access import ClientAccess
from fusionroute.api_keys import ShownKey
from fusionroute.grpc_runtime import Service, channel, error_from_rpc
from fusionroute.v1 import expert_pb2, expert_pb2_grpc

# ruff: noqa: N802 - the contract names the methods

NAME = "fusionroute.v1.ExpertService"
SHOP = "kT0m5Qb8-shop-shop-shop-shop"
NEXT = "Ma3nV9yy-next-next-next-next"


class Doorman(expert_pb2_grpc.ExpertServiceServicer):
    """Says who has been let in."""

    def __init__(self) -> None:
        self.callers: list[object] = []

    async def GetInfo(self, request: Any, context: Any) -> expert_pb2.GetInfoResponse:
        self.callers.append(structlog.contextvars.get_contextvars().get("caller"))
        return expert_pb2.GetInfoResponse(slot="math")

    async def _not_asked(self, request: Any, context: Any) -> Any:
        raise NotImplementedError

    Step = StepBatch = CloseSession = ListSessions = Reload = _not_asked

    async def StepStream(
        self, request_iterator: Any, context: Any
    ) -> AsyncIterator[expert_pb2.StepStreamResponse]:
        async for request in request_iterator:
            self.callers.append(structlog.contextvars.get_contextvars().get("caller"))
            results = [expert_pb2.StreamedResult(id=step.id) for step in request.steps]
            yield expert_pb2.StepStreamResponse(results=results)

    async def Score(self, request: Any, context: Any) -> AsyncIterator[expert_pb2.ScoreResponse]:
        for position in range(3):
            self.callers.append(structlog.contextvars.get_contextvars().get("caller"))
            yield expert_pb2.ScoreResponse(from_position=position)


def service_of(doorman: Doorman) -> Service:
    return Service(NAME, lambda s: expert_pb2_grpc.add_ExpertServiceServicer_to_server(doorman, s))


def key(value: str) -> ClientAccess:
    return ClientAccess(key=ShownKey(value))


async def ask(address: str, access: ClientAccess | None = None) -> str:
    """The slot that GetInfo tells. Raises FusionRouteError."""
    async with channel(address, access=access) as opened:
        return await ask_over(opened)


async def ask_over(opened: grpc.aio.Channel) -> str:
    try:
        return (
            await expert_pb2_grpc.ExpertServiceStub(opened).GetInfo(expert_pb2.GetInfoRequest(), timeout=10)
        ).slot
    except grpc.aio.AioRpcError as error:
        raise error_from_rpc(error) from None


async def stream(address: str, access: ClientAccess | None = None) -> list[int]:
    """The positions that Score tells. Raises FusionRouteError."""
    async with channel(address, access=access) as opened:
        call = expert_pb2_grpc.ExpertServiceStub(opened).Score(expert_pb2.ScoreRequest(), timeout=10)
        try:
            return [response.from_position async for response in call]
        except grpc.aio.AioRpcError as error:
            raise error_from_rpc(error) from None


async def both_streams(address: str, access: ClientAccess | None = None) -> list[int]:
    """The ids that StepStream answers. Raises FusionRouteError."""
    async with channel(address, access=access) as opened:
        call = expert_pb2_grpc.ExpertServiceStub(opened).StepStream(timeout=10)
        try:
            await call.write(expert_pb2.StepStreamRequest(steps=[expert_pb2.StreamedStep(id=7)]))
            await call.done_writing()
            return [result.id async for response in call for result in response.results]
        except grpc.aio.AioRpcError as error:
            raise error_from_rpc(error) from None
