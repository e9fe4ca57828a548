"""A stream of tokens that outlives whoever serves it: where it breaks, it goes on at the next token, anywhere.

    generate ──breaks──> generate again (same request id: one turn) ──started──> resume at the next token ──> finished

Nothing in here knows addresses or gRPC: `Streams` does.
"""

from __future__ import annotations

import asyncio
import secrets
import time
import uuid
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import dataclass
from typing import Protocol

from fusionroute.errors import FusionRouteError, OutOfRoom, Reason, SessionStateError, Unavailable
from fusionroute.grpc_runtime import backoff_seconds
from fusionroute.rpc_errors import was_transport
from fusionroute.v1.router_pb2 import GenerateRequest, GenerationEvent, OnExpertUnavailable, Started

UNKNOWN_SECONDS = 15.0
"""How long a session that was begun may be unknown: a Redis that has lost it gets it back from its writer."""
FIRST_PAUSE_SECONDS = 0.05
LONGEST_PAUSE_SECONDS = 1.0

_PASSING = frozenset({Reason.LEASE_LOST, Reason.SESSION_BUSY})


@dataclass(frozen=True, slots=True)
class Patience:
    """How long an answer may take.

    Attributes:
        total_seconds: for all of it.
        stall_seconds: from one token to the next, whatever happens in between.
        silent_seconds: a stream that says nothing for so long is left for another one.
    """

    total_seconds: float = 600.0
    stall_seconds: float = 180.0
    silent_seconds: float = 15.0


class Streams(Protocol):
    """Routers that can be asked, one at a time."""

    def generate(
        self, request: GenerateRequest, timeout_seconds: float
    ) -> AsyncGenerator[GenerationEvent, None]:
        """A turn's events, from its beginning."""

    def resume(
        self, session_id: str, from_token: int, timeout_seconds: float
    ) -> AsyncGenerator[GenerationEvent, None]:
        """The latest turn's events, from one of its tokens on."""

    def turn_to_next(self) -> None:
        """Another router shall be asked from now on."""


def identified(request: GenerateRequest) -> GenerateRequest:
    """The request with ids and a seed of its own where it names none, so that sending it again changes nothing."""
    whole = GenerateRequest()
    whole.CopyFrom(request)
    whole.session_id = request.session_id or uuid.uuid4().hex
    whole.request_id = request.request_id or uuid.uuid4().hex
    if not request.sampling.HasField("seed"):
        whole.sampling.seed = secrets.randbits(64)
    return whole


async def unbroken(
    streams: Streams,
    request: GenerateRequest,
    patience: Patience | None = None,
    on_break: Callable[[FusionRouteError], None] = lambda error: None,
) -> AsyncGenerator[GenerationEvent, None]:
    """The events of a turn: Started, each Token once, Finished once, however often the stream breaks in between.

    Resumed tokens show no routing weights and no top candidates: those are not stored.

    Args:
        on_break: hears of each break that is about to be mended.

    Raises:
        FusionRouteError: what going on cannot mend, or what was still wrong when `patience` had come to its end;
            TURN_FORKED when what goes on is not what had begun.
    """
    answer = _Answer(identified(request), patience or Patience())
    while not answer.is_finished:
        try:
            async with aclosing(answer.events_of(streams)) as events:
                async for event in events:
                    yield event
                    answer.has_progressed()  # however long the reader took
        except FusionRouteError as error:
            pause = answer.pause_after(error)
            if pause is None:
                raise
            on_break(error)
            streams.turn_to_next()
            await asyncio.sleep(pause)


class _Answer:
    """How far an answer has come."""

    def __init__(self, request: GenerateRequest, patience: Patience) -> None:
        now = time.monotonic()
        self.is_finished = False
        self._request = request
        self._patience = patience
        self._deadline = now + patience.total_seconds
        self._progressed = now
        self._known = now
        self._started: Started | None = None
        self._num_tokens = 0
        self._num_breaks = 0

    def has_progressed(self) -> None:
        """An event has come that had not been there before."""
        self._progressed = self._known = time.monotonic()
        self._num_breaks = 0

    async def events_of(self, streams: Streams) -> AsyncGenerator[GenerationEvent, None]:
        """The further events that one stream brings."""
        limit = max(self._give_up - time.monotonic(), 0.001)
        if self._started is None:
            stream = streams.generate(self._request, limit)
        else:
            stream = streams.resume(self._started.session_id, self._num_tokens, limit)
        async with aclosing(stream):
            while not self.is_finished:
                event = await self._next(stream)
                if self._is_news(event):
                    yield event

    async def _next(self, stream: AsyncGenerator[GenerationEvent, None]) -> GenerationEvent:
        limit = min(self._patience.silent_seconds, max(self._give_up - time.monotonic(), 0.001))
        try:
            async with asyncio.timeout(limit):
                return await anext(stream)
        except TimeoutError:
            message = f"the stream said nothing for {limit:.3g} s"
            raise Unavailable(Reason.DEADLINE_PASSED, message) from None
        except StopAsyncIteration:
            message = "the stream ended without Finished"
            raise Unavailable(Reason.DRAINING, message) from None

    def _is_news(self, event: GenerationEvent) -> bool:
        """Takes an event into account; False for what had come before the break already."""
        kind = event.WhichOneof("event")
        if kind == "started":
            return self._is_first_start(event.started)
        if kind == "token":
            if event.token.index > self._num_tokens:
                raise self._forked(f"token {event.token.index} came after {self._num_tokens} tokens")
            if event.token.index < self._num_tokens:
                return False
            self._num_tokens += 1
        elif kind == "finished":
            if event.finished.num_generated_tokens != self._num_tokens:
                raise self._forked(
                    f"{self._num_tokens} tokens had come, the turn has {event.finished.num_generated_tokens}"
                )
            self.is_finished = True
        return True

    def _is_first_start(self, started: Started) -> bool:
        first = self._started
        if first is None:
            self._started = started
            return True
        for name in ("session_id", "num_prompt_tokens", "seed", "checkpoint"):
            if getattr(started, name) != getattr(first, name):
                raise self._forked(f"{name} was {getattr(first, name)} and is {getattr(started, name)}")
        return False

    def pause_after(self, error: FusionRouteError) -> float | None:
        """How long to wait before going on; None: there is no going on."""
        now = time.monotonic()
        pause = backoff_seconds(self._num_breaks, first=FIRST_PAUSE_SECONDS, most=LONGEST_PAUSE_SECONDS)
        if self._num_breaks:  # the first time, another router may know better
            pause = max(pause, min(error.retry_after_seconds or 0.0, LONGEST_PAUSE_SECONDS))
        self._num_breaks += 1
        if not self._is_passing(error, now) or now + pause >= self._give_up:
            return None
        return pause

    def _is_passing(self, error: FusionRouteError, now: float) -> bool:
        if was_transport(error):
            return True
        if error.reason is Reason.SESSION_UNKNOWN and error.metadata.get("deleted") != "true":
            return self._started is not None and now - self._known < UNKNOWN_SECONDS
        self._known = now
        if isinstance(
            error, OutOfRoom
        ):  # whether to wait for room is the caller's to decide, until it has begun
            return self._started is not None
        if error.reason is Reason.EXPERT_UNAVAILABLE:
            return self._request.on_expert_unavailable != OnExpertUnavailable.ON_EXPERT_UNAVAILABLE_FAIL
        return isinstance(error, Unavailable) or error.reason in _PASSING

    @property
    def _give_up(self) -> float:
        return min(self._deadline, self._progressed + self._patience.stall_seconds)

    def _forked(self, what: str) -> SessionStateError:
        session_id = self._request.session_id
        return SessionStateError(Reason.TURN_FORKED, f"session {session_id!r} went on differently: {what}")
