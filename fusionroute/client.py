"""What an application needs to talk to a router: typed calls, our errors, streams closed behind it.

async with RouterClient.open("127.0.0.1:50050") as router:
    print((await router.complete("box: 4+4=", max_tokens=20)).text)
    async with router.stream("box: 4+4=", combine="select") as answer:
        async for token in answer:
            print(token.text, token.expert)

Below these are the calls of the contract, message for message.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from typing import TypeVar, Unpack

import grpc

from fusionroute.access import ClientAccess
from fusionroute.answer_stream import AnswerStream
from fusionroute.answers import Completion, Expert, ScoredToken, Session
from fusionroute.calls import answer_of, answers_of
from fusionroute.errors import AccessDenied, FusionRouteError, invalid
from fusionroute.grpc_runtime import channel
from fusionroute.questions import Options, Prompt, ScoringOptions, generate_request, score_request
from fusionroute.rpc_errors import was_transport
from fusionroute.unbroken import Patience, identified, unbroken
from fusionroute.v1 import registry_pb2, registry_pb2_grpc, router_pb2, router_pb2_grpc
from fusionroute.v1.registry_pb2 import ExpertEntry, ExpertState
from fusionroute.v1.router_pb2 import (
    GenerateRequest,
    GenerationEvent,
    GetRouterInfoResponse,
    GetSessionResponse,
    PromptToken,
    ResumeRequest,
    ScorePromptRequest,
)

CALL_TIMEOUT_SECONDS = 15.0
STREAM_TIMEOUT_SECONDS = 600.0

Answer = TypeVar("Answer")


class RouterClient:
    """Connections to one router or several that share their sessions.

    A call goes to the router that was asked last; where the connection breaks, to the next one. All methods raise
    FusionRouteError as the router meant it.
    """

    def __init__(self, routers: Sequence[tuple[str, grpc.aio.Channel]]) -> None:
        assert routers, "at least one router"
        self._routers = [_Router(address, connection) for address, connection in routers]
        self._current = 0

    @classmethod
    @asynccontextmanager
    async def open(cls, address: str, access: ClientAccess | None = None) -> AsyncIterator[RouterClient]:
        """A client for as long as the block lasts.

        Args:
            address: host:port; of several routers with commas between them.
            access: certificates and key to show; None = what the environment says (`ClientAccess.from_environment`).

        Raises:
            InvalidRequest: an address is missing.
        """
        addresses = [part.strip() for part in address.split(",")]
        if not all(addresses):
            raise invalid("address", address, "host:port, or several with commas between them")
        access = access or ClientAccess.from_environment()
        async with AsyncExitStack() as stack:
            yield cls([(a, await stack.enter_async_context(channel(a, access=access))) for a in addresses])

    @property
    def address(self) -> str:
        """Of the router that is asked now."""
        return self._router.address

    @property
    def _router(self) -> _Router:
        return self._routers[self._current]

    def turn_to_next(self) -> None:
        """Another router shall be asked from now on, if there is one."""
        self._current = (self._current + 1) % len(self._routers)

    # --- in plain Python -----------------------------------------------------------------------------------------

    def stream(
        self, prompt: Prompt, *, patience: Patience | None = None, **options: Unpack[Options]
    ) -> AnswerStream:
        """An answer, token by token; a stream that breaks goes on at the next token.

        Args:
            prompt: a text, token ids, or messages for the chat template.
            patience: how long the answer may take.
            options: see `fusionroute.questions.Options`.

        Raises:
            InvalidRequest: an option cannot be that. While reading: FusionRouteError as the router meant it.
        """
        request = identified(generate_request(prompt, options))
        return AnswerStream(
            self.unbroken(request, patience),
            self.cancel,
            session_id=request.session_id,
            cancels_on_leaving=request.one_off,
        )

    async def complete(
        self, prompt: Prompt, *, patience: Patience | None = None, **options: Unpack[Options]
    ) -> Completion:
        """A whole answer. Arguments and errors as of `stream`."""
        return await self.stream(prompt, patience=patience, **options).read()

    async def chat(
        self,
        messages: str | Sequence[Mapping[str, str]],
        *,
        patience: Patience | None = None,
        **options: Unpack[Options],
    ) -> Completion:
        """The answer to messages, or to one of a user. As `stream`, which takes messages too."""
        if isinstance(messages, str):
            messages = [{"role": "user", "content": messages}]
        return await self.complete(messages, patience=patience, **options)

    def follow(
        self, session_id: str, from_token: int = 0, timeout_seconds: float = STREAM_TIMEOUT_SECONDS
    ) -> AnswerStream:
        """The latest answer of a session from its token `from_token` on, written or still being written.

        An answer whose writing broke off is continued. One stream of one router: when it breaks, it breaks.
        """
        return AnswerStream(
            self.resume(session_id, from_token, timeout_seconds),
            self.cancel,
            session_id=session_id,
            cancels_on_leaving=False,
        )

    async def score(
        self,
        prompt: Prompt,
        *,
        from_position: int = 0,
        ways: Sequence[ScoringOptions] = (),
        **options: Unpack[ScoringOptions],
    ) -> list[ScoredToken]:
        """What each token of a prompt, from one of its positions on, would have been worth.

        Args:
            ways: further ways to judge the same tokens, by `combine` and `expert`, at the price of one; at most 32.
        """
        request = score_request(prompt, options, from_position, ways)
        async with aclosing(self.score_prompt(request)) as tokens:
            return [ScoredToken.of(token) async for token in tokens]

    async def session(self, session_id: str) -> Session:
        """What is stored of a session. Raises SESSION_UNKNOWN."""
        return Session.of(await self.get_session(session_id))

    async def experts(self, timeout_seconds: float = CALL_TIMEOUT_SECONDS) -> list[Expert]:
        """The experts that the routers know, by slot."""
        entries = await self.list_experts(timeout_seconds)
        return sorted(map(Expert.of, entries), key=lambda expert: (expert.slot, expert.instance_id))

    # --- message for message -------------------------------------------------------------------------------------

    def unbroken(
        self,
        request: GenerateRequest,
        patience: Patience | None = None,
        on_break: Callable[[FusionRouteError], None] = lambda error: None,
    ) -> AsyncGenerator[GenerationEvent, None]:
        """As `generate`, but a stream that breaks goes on at the next token: see `fusionroute.unbroken`."""
        return unbroken(self, request, patience, on_break)

    async def generate(
        self, request: GenerateRequest, timeout_seconds: float = STREAM_TIMEOUT_SECONDS
    ) -> AsyncGenerator[GenerationEvent, None]:
        """The events of a turn: Started, Tokens, Finished. Leaving early ends the call, not the turn.

        One stream of one router: when it breaks, it breaks.
        """
        call = self._router.sessions.Generate(request, timeout=timeout_seconds)
        async with aclosing(answers_of(call, self.address)) as responses:
            async for response in responses:
                yield response.event

    async def resume(
        self, session_id: str, from_token: int = 0, timeout_seconds: float = STREAM_TIMEOUT_SECONDS
    ) -> AsyncGenerator[GenerationEvent, None]:
        """The events of a session's latest turn from its generated token `from_token` on."""
        request = ResumeRequest(session_id=session_id, from_token=from_token)
        call = self._router.sessions.Resume(request, timeout=timeout_seconds)
        async with aclosing(answers_of(call, self.address)) as responses:
            async for response in responses:
                yield response.event

    async def score_prompt(
        self, request: ScorePromptRequest, timeout_seconds: float = STREAM_TIMEOUT_SECONDS
    ) -> AsyncGenerator[PromptToken, None]:
        """What each token of a prompt would have been worth, in order. Leaving early ends the scoring."""
        call = self._router.sessions.ScorePrompt(request, timeout=timeout_seconds)
        async with aclosing(answers_of(call, self.address)) as responses:
            async for response in responses:
                for token in response.tokens:
                    yield token

    async def cancel(self, session_id: str) -> bool:
        """Stops the running turn of a session; False when none was running."""
        request = router_pb2.CancelRequest(session_id=session_id)
        return (
            await self._ask(lambda router: router.sessions.Cancel(request, timeout=CALL_TIMEOUT_SECONDS))
        ).was_running

    async def get_session(self, session_id: str) -> GetSessionResponse:
        """What is stored of a session."""
        request = router_pb2.GetSessionRequest(session_id=session_id)
        return await self._ask(
            lambda router: router.sessions.GetSession(request, timeout=CALL_TIMEOUT_SECONDS)
        )

    async def delete_session(self, session_id: str) -> bool:
        """Forgets a session; False when there was none."""
        request = router_pb2.DeleteSessionRequest(session_id=session_id)
        return (
            await self._ask(
                lambda router: router.sessions.DeleteSession(request, timeout=CALL_TIMEOUT_SECONDS)
            )
        ).existed

    async def info(self, timeout_seconds: float = CALL_TIMEOUT_SECONDS) -> GetRouterInfoResponse:
        """The checkpoint that routes, its slots and their state."""
        request = router_pb2.GetRouterInfoRequest()
        return await self._ask(lambda router: router.sessions.GetRouterInfo(request, timeout=timeout_seconds))

    async def list_experts(self, timeout_seconds: float = CALL_TIMEOUT_SECONDS) -> list[ExpertEntry]:
        """The experts in the registry."""
        request = registry_pb2.ListExpertsRequest()
        return list(
            (
                await self._ask(lambda router: router.registry.ListExperts(request, timeout=timeout_seconds))
            ).experts
        )

    async def _ask(self, call: Callable[[_Router], Awaitable[Answer]]) -> Answer:
        """One call, of the next router where the connection breaks. All calls in here may be repeated."""
        for _ in self._routers[1:]:
            try:
                return await answer_of(call(self._router), self.address)
            except FusionRouteError as error:
                if not was_transport(error):
                    raise
                self.turn_to_next()
        return await answer_of(call(self._router), self.address)


class _Router:
    """One router's address and services."""

    def __init__(self, address: str, connection: grpc.aio.Channel) -> None:
        self.address = address
        self.sessions = router_pb2_grpc.RouterServiceStub(connection)
        self.registry = registry_pb2_grpc.RegistryServiceStub(connection)


def expert_state_name(state: ExpertState.ValueType) -> str:
    """ "ready", "draining" or "unspecified"."""
    return ExpertState.Name(state).removeprefix("EXPERT_STATE_").lower()


def ask_registry(address: str, timeout_seconds: float = 3.0) -> dict[str, str]:
    """State of each slot in the registry of the router at `address`; empty when it does not answer.

    Raises:
        AccessDenied: it answers, but not to us.
    """

    async def ask() -> dict[str, str]:
        async with RouterClient.open(address) as router:
            entries = await router.list_experts(timeout_seconds)
        # One that serves counts, whoever else drains or stands by.
        entries.sort(key=lambda entry: entry.state == ExpertState.EXPERT_STATE_READY)
        return {entry.slot: expert_state_name(entry.state) for entry in entries}

    try:
        return asyncio.run(ask())
    except AccessDenied:
        raise
    except FusionRouteError:
        return {}
