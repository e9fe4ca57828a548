"""One running expert process as the router sees it: its entry in the registry, the connection to it, its breaker."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import grpc
import numpy as np
import structlog
from grpc_health.v1 import health_pb2, health_pb2_grpc
from numpy.typing import NDArray

from fusionroute import tracing, wire
from fusionroute.engine import StepCall
from fusionroute.errors import FusionRouteError, InternalFault, Reason, Unavailable
from fusionroute.rpc_context import outgoing_metadata
from fusionroute.rpc_errors import error_from_peer
from fusionroute.top_logits import short_rows
from fusionroute.v1 import expert_pb2, expert_pb2_grpc, registry_pb2
from router_service.asking import Answer
from router_service.breaker import Breaker, BreakerState
from router_service.instance_choice import Standing, View
from router_service.step_line import NoStreams, StepLine, streams_over

log = structlog.get_logger(__name__)

CLOSE_SECONDS = 2.0
KNOCK_SECONDS = 1.0
MAX_STREAMED_TOKENS = 16_384
"""A longer step, such as the replay of a long session, goes by a call of its own and holds up nobody."""
FLOAT_BYTES = 4
SHARED_MEMORY_BYTES = 32 * 2**20
"""For the rows of one instance that are on their way or still looked at; more of them come in messages."""
MOST_SHARED_ROWS = 128
LEAST_SHARED_BYTES = 16_384
"""Smaller rows gain nothing from shared memory."""
LEAST_MEMORY_BYTES = 65_536
"""Of a memory that only proves that both sides are on one host."""
SILENCE_SECONDS = 0.25
"""An attempt that was given less time than this says nothing about the server when it is broken off."""

_STANDINGS = {
    registry_pb2.EXPERT_STATE_READY: Standing.READY,
    registry_pb2.EXPERT_STATE_STANDBY: Standing.STANDBY,
}


def step_request(call: StepCall, epoch: int) -> expert_pb2.StepRequest:
    """A step as the contract has it, for a model of an epoch."""
    request = expert_pb2.StepRequest(
        session_id=call.session_id,
        from_position=call.from_position,
        token_ids=call.token_ids,
        num_rows=0 if call.row_indices else call.num_rows,
        expected_epoch=epoch,
        fence=call.fence,
        prefix_digest=call.prefix_digest,
        row_indices=call.row_indices,
        exact=call.exact,
    )
    draft = call.draft
    if draft is not None:
        request.draft_tokens = draft.num_tokens
        choice = request.draft_choice
        choice.temperature, choice.top_k = draft.sampling.temperature, draft.sampling.top_k
        choice.top_p, choice.min_p = draft.sampling.top_p, draft.sampling.min_p
        choice.seed, choice.min_probability = draft.sampling.seed, draft.min_probability
        choice.end_ids.extend(sorted(draft.end_ids))
    return request


def _rows_bytes(call: StepCall, width: int) -> int:
    """What the rows of a step need at most, as float32."""
    num_drafted = 0 if call.draft is None else call.draft.num_tokens
    return (len(call.wanted) + num_drafted) * width * FLOAT_BYTES


def _no_rows(width: int) -> NDArray[np.float32]:
    return np.empty((0, width), np.float32)


def _nothing(instance: Instance) -> None:
    """Nobody wants to know."""


@dataclass(slots=True, eq=False)
class Instance:
    """One running expert process and the connection to it.

    Attributes:
        suspect_until: it failed a moment ago; another one is preferred until then (time.monotonic()).
        gone_since: the registry has not listed it since then; None while it does.
        num_in_flight: steps of this router that it works on.
        on_breaker: hears when the breaker has changed its state.
        memory_bytes: size of the memory that is offered for rows; 0 = none.
        least_shared_bytes: smaller rows come in messages.
        has_socket: whether messages may go over a socket of their own where memory is shared.
        has_streams: False once the expert was found not to know streams.
        line: the way of steps to it.
    """

    entry: registry_pb2.ExpertEntry
    channel: grpc.aio.Channel
    stub: expert_pb2_grpc.ExpertServiceAsyncStub
    breaker: Breaker = field(default_factory=Breaker)
    suspect_until: float = 0.0
    gone_since: float | None = None
    num_in_flight: int = 0
    on_breaker: Callable[[Instance], None] = _nothing
    memory_bytes: int = 0
    least_shared_bytes: int = LEAST_SHARED_BYTES
    has_socket: bool = False
    has_streams: bool = True
    line: StepLine = field(init=False)

    def __post_init__(self) -> None:
        row_bytes = self.entry.model.logits_width * FLOAT_BYTES
        memory_bytes = min(self.memory_bytes, MOST_SHARED_ROWS * row_bytes)
        if memory_bytes and self.has_socket:  # which narrow rows gain by too
            memory_bytes = max(memory_bytes, LEAST_MEMORY_BYTES)
        elif row_bytes < self.least_shared_bytes:
            memory_bytes = 0
        self.line = StepLine(
            streams_over(self.channel), self.entry.address, memory_bytes=memory_bytes, has_socket=self.has_socket
        )

    @property
    def name(self) -> str:
        """Instance and epoch: a restart has another cache."""
        return f"{self.entry.instance_id}@{self.entry.model.epoch}"

    @property
    def epoch(self) -> int:
        """The slot's, under which it serves; the model's in a registry that does not know slots' epochs."""
        return self.entry.epoch or self.entry.model.epoch

    @property
    def is_ready(self) -> bool:
        """Whether it takes new sessions."""
        return self.entry.state == registry_pb2.EXPERT_STATE_READY and self.gone_since is None

    @property
    def is_undoubted(self) -> bool:
        """Whether there is no reason to look for another one."""
        return (
            self.breaker.state is BreakerState.CLOSED
            and self.is_ready
            and (self.suspect_until == 0.0 or self.suspect_until <= time.monotonic())
        )

    @property
    def standing(self) -> Standing:
        """What the registry thinks of it."""
        if self.gone_since is not None:
            return Standing.VANISHED
        finishes = self.entry.drain_policy == registry_pb2.DRAIN_POLICY_FINISH
        return _STANDINGS.get(self.entry.state, Standing.FINISHING if finishes else Standing.MIGRATING)

    def view(self, now: float) -> View:
        """As the choice between instances sees it."""
        return View(
            name=self.name,
            standing=self.standing,
            epoch=self.epoch,
            is_let_in=self.breaker.lets_in(),
            is_suspect=self.suspect_until > now,
            load=self.num_in_flight + self.entry.load.queue_depth,
        )

    async def step(self, call: StepCall, deadline: float, top_logits: int = 0) -> Answer:
        """One step over the wire, watched by the breaker.

        Args:
            call: the step.
            deadline: on the clock of time.monotonic().
            top_logits: ask for so many of the highest logits of each row only, unless rows come through shared memory;
                0 = whole rows. The same step asked again for whole rows is not computed again.

        Raises:
            FusionRouteError: see `ExpertService.Step`.
        """
        name, epoch, began = self.name, self.epoch, time.monotonic()  # the entry may change meanwhile
        width = self.entry.model.logits_width
        if top_logits >= width or self.line.shares_memory:
            top_logits = 0
        self.breaker.begin()
        self.num_in_flight += 1
        try:
            response, rows = await self._call(call, deadline, width, top_logits)
            top = tuple(short_rows(response.top, width, top_logits)) if top_logits else ()
        except FusionRouteError as error:
            self._judge(error, time.monotonic() - began)
            raise
        except asyncio.CancelledError:
            self.breaker.leave()
            raise
        finally:
            self.num_in_flight -= 1
        if self.breaker.succeed():
            self.on_breaker(self)
        return Answer(
            rows=rows,
            head_scores=None,
            epoch=epoch,
            cache=name,
            forward_seconds=response.timings.forward_seconds,
            drafted_ids=tuple(response.drafted_ids),
            top=top,
        )

    async def _call(
        self, call: StepCall, deadline: float, width: int, top_logits: int
    ) -> tuple[expert_pb2.StepResponse, NDArray[np.float32]]:
        """The answer to a step and its rows [n, V], over the stream where the expert knows streams."""
        request = step_request(call, self.entry.model.epoch)
        request.top_logits = top_logits
        is_small = width * FLOAT_BYTES < self.least_shared_bytes
        rows_bytes = 0 if top_logits or is_small else _rows_bytes(call, width)
        if self.has_streams and len(call.token_ids) <= MAX_STREAMED_TOKENS:
            try:
                reply = await self.line.step(request, deadline, rows_bytes)
                return reply.response, _no_rows(width) if top_logits else reply.rows(width)
            except NoStreams:
                self.has_streams = False
                log.info("expert_without_streams", address=self.entry.address, slot=self.entry.slot)
        response = await self._unary(request, deadline)
        return response, _no_rows(width) if top_logits else wire.matrix_to_numpy(response.rows, width)

    async def _unary(self, request: expert_pb2.StepRequest, deadline: float) -> expert_pb2.StepResponse:
        timeout = max(0.001, deadline - time.monotonic())
        try:
            metadata = outgoing_metadata(tracing.traceparent())
            return await self.stub.Step(request, timeout=timeout, metadata=metadata)
        except grpc.aio.AioRpcError as error:
            raise error_from_peer(error, self.entry.address) from error
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is None or task.cancelling():
                raise
            # Closing a channel cancels its calls; to whoever waits for one, the expert has gone.
            raise Unavailable(
                Reason.EXPERT_UNAVAILABLE, f"the connection to {self.entry.address} was closed"
            ) from None

    def _judge(self, error: FusionRouteError, seconds: float) -> None:
        """Tells the breaker of what the server has to answer for; not of what the caller did, nor of draining."""
        is_silence = error.reason is Reason.DEADLINE_PASSED
        is_unavailable = isinstance(error, Unavailable) and error.reason is not Reason.DRAINING
        if (is_unavailable or isinstance(error, InternalFault)) and not (
            is_silence and seconds < SILENCE_SECONDS
        ):
            if self.breaker.fail(time.monotonic(), silent=is_silence):
                self.on_breaker(self)
        else:
            self.breaker.leave()

    async def knock(self) -> bool:
        """Whether it answers at all, and works as far as it knows."""
        request = health_pb2.HealthCheckRequest()
        try:
            answer = await health_pb2_grpc.HealthStub(self.channel).Check(request, timeout=KNOCK_SECONDS)
        except grpc.aio.AioRpcError:
            return False
        # One that drains says that it does not serve, and still does where nobody else is there.
        return (
            answer.status == health_pb2.HealthCheckResponse.SERVING
            or self.entry.state == registry_pb2.EXPERT_STATE_DRAINING
        )

    def let_go(self, session_id: str, fence: int) -> bool:
        """Tells the expert that nobody will step a session again; others may still begin with what it computed.

        Returns:
            Whether there is a stream to tell it on; it is not answered, and evicted in time where it is not heard.
        """
        request = expert_pb2.CloseSessionRequest(session_id=session_id, fence=fence, may_share=True)
        return self.has_streams and self.line.let_go(request)

    async def close_session(self, session_id: str, fence: int, *, may_share: bool = False) -> bool:
        """Asks the expert to forget a session; an expert that does not answer will evict it in time.

        Args:
            may_share: other sessions may still begin with what was computed for it.

        Returns:
            Whether it has answered.
        """
        request = expert_pb2.CloseSessionRequest(session_id=session_id, fence=fence, may_share=may_share)
        try:
            await self.stub.CloseSession(request, timeout=CLOSE_SECONDS)
        except grpc.aio.AioRpcError:
            return False
        return True

    async def close(self) -> None:
        """Ends the streams and closes the connection; steps that wait fail."""
        await self.line.close()
        await self.channel.close()
