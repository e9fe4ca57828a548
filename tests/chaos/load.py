"""Clients that read generations while the stack is hurt, and write down every token with the moment of its arrival."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from uuid import uuid4

from fusionroute.client import RouterClient
from fusionroute.errors import FusionRouteError
from fusionroute.unbroken import Patience
from fusionroute.v1.router_pb2 import Finished, GenerateRequest, GenerationEvent, Started, Token
from tests.equivalence import Case
from tests.served_stack import Answer

IMPATIENT_SECONDS = 3.0
"""Every other client leaves a stream that says nothing for so long; the others have the product's own patience."""


@dataclass(slots=True, eq=False)
class Stream:
    """One generation as its client sees it.

    Attributes:
        tokens: every token event, in order of arrival, once.
        arrivals: the moment of each, time.monotonic().
        breaks: of the connection, that the client has mended.
        client: that reads it now.
        faults: what no application should ever see: a gap, a repetition, an end without all tokens.
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
    breaks: list[str] = field(default_factory=list)
    client: RouterClient | None = None
    faults: list[str] = field(default_factory=list)
    failure: str = ""
    leaves_after: int | None = None
    """The client hangs up when it has received so many tokens, and comes back after `away_seconds`."""
    away_seconds: float = 0.0
    returns_by_resume: bool = True
    """Otherwise by the same request again, which repeats from the beginning, like an application that has forgotten."""
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

    @property
    def router(self) -> str:
        """Address of the router that is asked now."""
        return "" if self.client is None else self.client.address

    def broke(self, error: FusionRouteError) -> None:
        """The client mends a break."""
        self.breaks.append(f"{error.reason.value}: {error.message}")

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

    def take_again(self, event: GenerationEvent) -> None:
        """An event of a stream that begins anew: what is known already must come again as it was."""
        token = event.token
        if event.WhichOneof("event") != "token" or token.index >= len(self.tokens):
            self.take(event)
        elif (token.id, token.expert_epoch) != (
            (known := self.tokens[token.index]).id,
            known.expert_epoch,
        ):
            self.faults.append(f"token {token.index} was {known.id} and is {token.id} now")


@dataclass(frozen=True, slots=True)
class Clients:
    """Applications: each has a client of its own, which knows all routers.

    Attributes:
        addresses: of the routers.
        timeout_seconds: how long a client has patience.
    """

    addresses: Sequence[str]
    timeout_seconds: float

    async def read(self, stream: Stream, number: int, first: int) -> None:
        """Reads a generation to its end, whatever it takes; a failure is written down.

        Args:
            number: of the client.
            first: number of the router that is asked first.
        """
        order = [*self.addresses[first:], *self.addresses[:first]]
        silent_seconds = IMPATIENT_SECONDS if number % 2 else Patience().silent_seconds
        patience = Patience(self.timeout_seconds, self.timeout_seconds, silent_seconds)
        stream.started_at = time.monotonic()
        try:
            async with RouterClient.open(",".join(order)) as client:
                stream.client = client
                events = client.unbroken(stream.request(), patience, on_break=stream.broke)
                async with aclosing(events):
                    async for event in events:
                        stream.take(event)
                        if stream.wants_to_leave:
                            break
            if stream.wants_to_leave:
                await self._come_back(stream, [order[-1], *order[:-1]], patience)
            if stream.finished is None:
                stream.failure = "the stream ended without Finished"
        except FusionRouteError as error:
            last = f" after {stream.breaks[-1]}" if stream.breaks else ""
            stream.failure = f"{error.reason.value}: {error.message}{last}"
        stream.ended_at = time.monotonic()

    async def _come_back(self, stream: Stream, order: Sequence[str], patience: Patience) -> None:
        """A client that hung up asks another router for the rest, later."""
        stream.has_left = True
        await asyncio.sleep(stream.away_seconds)
        addresses = order[0] if stream.returns_by_resume else ",".join(order)
        async with RouterClient.open(addresses) as client:
            stream.client = client
            if stream.returns_by_resume:
                events, take = client.resume(stream.session_id, len(stream.tokens)), stream.take
            else:
                events = client.unbroken(stream.request(), patience, on_break=stream.broke)
                take = stream.take_again
            async with aclosing(events):
                async for event in events:
                    take(event)


async def read_all(
    clients: Clients, streams: Sequence[Stream], firsts: Sequence[int], num_concurrent: int
) -> None:
    """Reads all streams, `num_concurrent` at a time; `firsts` says whom each asks first."""
    gate = asyncio.Semaphore(num_concurrent)

    async def one(number: int, stream: Stream, first: int) -> None:
        async with gate:
            await clients.read(stream, number, first)

    async with asyncio.TaskGroup() as group:
        for number, (stream, first) in enumerate(zip(streams, firsts, strict=True)):
            group.create_task(one(number, stream, first))
