"""What an application needs to talk to a router: typed calls, our errors, streams closed behind it.

async with RouterClient.open("127.0.0.1:50050") as router:
    async with aclosing(router.generate(GenerateRequest(text="box: 4+4="))) as events:
        async for event in events: ...
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable
from contextlib import aclosing, asynccontextmanager
from typing import TypeVar

import grpc

from fusionroute.access import ClientAccess
from fusionroute.calls import answer_of, answers_of
from fusionroute.errors import FusionRouteError
from fusionroute.grpc_runtime import channel
from fusionroute.v1 import registry_pb2, registry_pb2_grpc, router_pb2, router_pb2_grpc
from fusionroute.v1.registry_pb2 import ExpertEntry, ExpertState
from fusionroute.v1.router_pb2 import (
    GenerateRequest,
    GenerationEvent,
    GetRouterInfoResponse,
    GetSessionResponse,
    ResumeRequest,
)

CALL_TIMEOUT_SECONDS = 15.0
STREAM_TIMEOUT_SECONDS = 600.0

Answer = TypeVar("Answer")


class RouterClient:
    """One connection to a router. All methods raise FusionRouteError as the router meant it."""

    def __init__(self, connection: grpc.aio.Channel, address: str) -> None:
        self.address = address
        self._router = router_pb2_grpc.RouterServiceStub(connection)
        self._registry = registry_pb2_grpc.RegistryServiceStub(connection)

    @classmethod
    @asynccontextmanager
    async def open(cls, address: str, access: ClientAccess | None = None) -> AsyncIterator[RouterClient]:
        """A client for the router at host:port, for as long as the block lasts.

        Args:
            access: certificates and key to show; None = what the environment says (`ClientAccess.from_environment`).
        """
        access = access or ClientAccess.from_environment()
        async with channel(address, access=access) as connection:
            yield cls(connection, address)

    async def generate(
        self, request: GenerateRequest, timeout_seconds: float = STREAM_TIMEOUT_SECONDS
    ) -> AsyncGenerator[GenerationEvent, None]:
        """The events of a turn: Started, Tokens, Finished. Leaving early ends the call, not the turn."""
        call = self._router.Generate(request, timeout=timeout_seconds)
        async with aclosing(answers_of(call, self.address)) as responses:
            async for response in responses:
                yield response.event

    async def resume(
        self, session_id: str, from_token: int = 0, timeout_seconds: float = STREAM_TIMEOUT_SECONDS
    ) -> AsyncGenerator[GenerationEvent, None]:
        """The events of a session's latest turn from its generated token `from_token` on."""
        request = ResumeRequest(session_id=session_id, from_token=from_token)
        call = self._router.Resume(request, timeout=timeout_seconds)
        async with aclosing(answers_of(call, self.address)) as responses:
            async for response in responses:
                yield response.event

    async def cancel(self, session_id: str) -> bool:
        """Stops the running turn of a session; False when none was running."""
        request = router_pb2.CancelRequest(session_id=session_id)
        return (await self._ask(self._router.Cancel(request, timeout=CALL_TIMEOUT_SECONDS))).was_running

    async def get_session(self, session_id: str) -> GetSessionResponse:
        """What is stored of a session."""
        request = router_pb2.GetSessionRequest(session_id=session_id)
        return await self._ask(self._router.GetSession(request, timeout=CALL_TIMEOUT_SECONDS))

    async def delete_session(self, session_id: str) -> bool:
        """Forgets a session; False when there was none."""
        request = router_pb2.DeleteSessionRequest(session_id=session_id)
        return (await self._ask(self._router.DeleteSession(request, timeout=CALL_TIMEOUT_SECONDS))).existed

    async def info(self, timeout_seconds: float = CALL_TIMEOUT_SECONDS) -> GetRouterInfoResponse:
        """The checkpoint that routes, its slots and their state."""
        request = router_pb2.GetRouterInfoRequest()
        return await self._ask(self._router.GetRouterInfo(request, timeout=timeout_seconds))

    async def list_experts(self, timeout_seconds: float = CALL_TIMEOUT_SECONDS) -> list[ExpertEntry]:
        """The experts in the registry."""
        request = registry_pb2.ListExpertsRequest()
        return list((await self._ask(self._registry.ListExperts(request, timeout=timeout_seconds))).experts)

    async def _ask(self, call: Awaitable[Answer]) -> Answer:
        return await answer_of(call, self.address)


def expert_state_name(state: ExpertState.ValueType) -> str:
    """ "ready", "draining" or "unspecified"."""
    return ExpertState.Name(state).removeprefix("EXPERT_STATE_").lower()


def ask_registry(address: str, timeout_seconds: float = 3.0) -> dict[str, str]:
    """State of each slot in the registry of the router at `address`; empty when it does not answer."""

    async def ask() -> dict[str, str]:
        async with RouterClient.open(address) as router:
            entries = await router.list_experts(timeout_seconds)
        return {entry.slot: expert_state_name(entry.state) for entry in entries}

    try:
        return asyncio.run(ask())
    except FusionRouteError:
        return {}
