"""Clients that read generations while the stack is hurt, and write down every token with the moment of its arrival."""

from __future__ import annotations

import asyncio
import itertools
import random
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import AsyncExitStack, aclosing
from dataclasses import dataclass, field
from uuid import uuid4

from fusionroute.client import RouterClient
from fusionroute.errors import FusionRouteError, Reason
from fusionroute.v1.router_pb2 import Finished, GenerateRequest, GenerationEvent, Started, Token
from tests.equivalence import Case
from tests.served_stack import Answer

SILENCE_SECONDS = 4.0
"""A stream that says nothing for so long is tried elsewhere."""
FATAL = frozenset({Reason.INVALID_FIELD, Reason.CONTEXT_FULL, Reason.INTERNAL, Reason.CHECKPOINT_CHANGED})


@dataclass(slots=True)
class Attempt:
    """One call of a client: to whom, from which token, and how it ended."""

    address: str
    from_token: int
    started_at: float
    error: str = ""


@dataclass(slots=True, eq=False)
class Stream:
    """One generation as its client sees it.

    Attributes:
        tokens: every token event, in order of arrival, once.
        arrivals: the moment of each, time.monotonic().
        faults: what no client should ever see: a gap, a repetition that differs, an end without all tokens.
    """

    case: Case
    session_id: str = field(default_factory=lambda: f"chaos-{uuid4().hex}")
    request_id: str = field(default_factory=lambda: uuid4().hex)
    tokens: list[Token] = field(default_factory=list)
    arrivals: list[float] = field(default_factory=list)
    started: Started | None = None
    finished: Finished | None = None
    started_at: float = 0.0
    ended_at: float = 0.0
    attempts: list[Attempt] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    failure: str = ""
    leaves_after: int | None = None
    """The client hangs up when it has received so many tokens, and comes back after `away_seconds`."""
    away_seconds: float = 0.0
    has_left: bool = False

    @property
    def is_in_flight(self) -> bool:
        """Tokens were received and more will come."""
        return bool(self.tokens) and self.finished is None and not self.failure

    @property
    def wants_to_leave(self) -> bool:
        """Whether it is time for the client to hang up."""
        return not self.has_left and self.leaves_after is not None and len(self.tokens) >= self.leaves_after

    @property
    def slots(self) -> set[str]:
        """The experts' slots that have taken part so far."""
        return {token.expert for token in self.tokens if token.expert}

    @property
    def longest_pause_seconds(self) -> float:
        """Between two tokens, before the first, or between the last and the end."""
        moments = [self.started_at, *self.arrivals, *([self.ended_at] if self.ended_at else [])]
        return max((after - before for before, after in itertools.pairwise(moments)), default=0.0)

    def request(self) -> GenerateRequest:
        """The case's request under this stream's ids."""
        request = self.case.request()
        request.session_id, request.request_id = self.session_id, self.request_id
        return request

    def answer(self) -> Answer:
        """What was received, as the comparison wants it."""
        return Answer(self.started or Started(), self.tokens, self.finished)

    def take(self, event: GenerationEvent) -> None:
        """An event of the stream as the application sees it: nothing may come twice, nothing may be missing."""
        match event.WhichOneof("event"):
            case "started":
                self.started = self.started or event.started
            case "token":
                token = event.token
                if token.index != len(self.tokens):
                    self.faults.append(f"token {token.index} came where {len(self.tokens)} was due")
                self.tokens.append(token)
                self.arrivals.append(time.monotonic())
            case "finished":
                if event.finished.num_generated_tokens != len(self.tokens):
                    wanted = event.finished.num_generated_tokens
                    self.faults.append(f"finished after {len(self.tokens)} tokens of {wanted}")
                self.finished = event.finished


@dataclass(slots=True, eq=False)
class Clients:
    """Connections to all routers; a stream that breaks is resumed at the next one. Use as a context manager."""

    addresses: Sequence[str]
    timeout_seconds: float
    _stack: AsyncExitStack = field(default_factory=AsyncExitStack)
    _clients: list[RouterClient] = field(default_factory=list)

    async def __aenter__(self) -> Clients:
        for address in self.addresses:
            self._clients.append(await self._stack.enter_async_context(RouterClient.open(address)))
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self._stack.aclose()

    async def read(self, stream: Stream, first: int) -> None:
        """Reads a generation to its end, whatever it takes; a failure is written down.

        Args:
            first: number of the router that is asked first.
        """
        stream.started_at = time.monotonic()
        try:
            async with asyncio.timeout(self.timeout_seconds):
                async with aclosing(self._surviving(stream, first)) as events:
                    async for event in events:
                        stream.take(event)
        except TimeoutError:
            last = next((attempt.error for attempt in reversed(stream.attempts) if attempt.error), "")
            stream.failure = f"not complete after {self.timeout_seconds:g} s; last: {last or 'silence'}"
        except FusionRouteError as error:
            stream.failure = f"{error.reason.value}: {error.message}"
        stream.ended_at = time.monotonic()

    async def _surviving(self, stream: Stream, first: int) -> AsyncGenerator[GenerationEvent, None]:
        """Events with every token once: what a call repeats is compared with what is there already."""
        number, is_begun = first, False
        while stream.finished is None:
            client = self._clients[number % len(self._clients)]
            attempt = Attempt(client.address, len(stream.tokens) if is_begun else 0, time.monotonic())
            stream.attempts.append(attempt)
            events = (
                client.resume(stream.session_id, attempt.from_token)
                if is_begun
                else client.generate(stream.request())
            )
            try:
                async with aclosing(events):
                    async for event in _unless_silent(events):
                        is_begun = True
                        if _is_repetition(stream, event):
                            continue
                        yield event
                        if stream.wants_to_leave:
                            break
            except TimeoutError:
                attempt.error = f"silent for {SILENCE_SECONDS:g} s"
            except FusionRouteError as error:
                attempt.error = f"{error.reason.value}: {error.message}"
                if error.reason in FATAL:
                    raise
                if error.reason is Reason.SESSION_UNKNOWN:
                    is_begun = False
            number += 1
            if stream.wants_to_leave:
                stream.has_left = True
                await asyncio.sleep(stream.away_seconds)
            await asyncio.sleep(random.uniform(0.05, 0.25))


async def _unless_silent(events: AsyncGenerator[GenerationEvent, None]) -> AsyncGenerator[GenerationEvent, None]:
    while True:
        async with asyncio.timeout(SILENCE_SECONDS):
            try:
                event = await anext(events)
            except StopAsyncIteration:
                return
        yield event


def _is_repetition(stream: Stream, event: GenerationEvent) -> bool:
    if event.WhichOneof("event") != "token" or event.token.index >= len(stream.tokens):
        return False
    known = stream.tokens[event.token.index]
    if known.id != event.token.id:
        stream.faults.append(f"token {known.index} was {known.id} and is {event.token.id} now")
    return True


async def read_all(
    clients: Clients, streams: Sequence[Stream], firsts: Sequence[int], num_concurrent: int
) -> None:
    """Reads all streams, `num_concurrent` at a time; `firsts` says whom each asks first."""
    gate = asyncio.Semaphore(num_concurrent)

    async def one(stream: Stream, first: int) -> None:
        async with gate:
            await clients.read(stream, first)

    async with asyncio.TaskGroup() as group:
        for stream, first in zip(streams, firsts, strict=True):
            group.create_task(one(stream, first))
