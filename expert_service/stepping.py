"""One step, from its message to the engine and back, whichever call it came by."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable
from typing import TypeAlias

from torch import Tensor

from expert_service import checks, watching
from expert_service.served_model import Held, ServedModel
from fusionroute.engine import Closing, Draft, StepCall, StepOutcome
from fusionroute.errors import FusionRouteError
from fusionroute.fusion import Sampling
from fusionroute.top_logits import top_logits_to_message, top_of_rows
from fusionroute.v1 import common_pb2, expert_pb2
from fusionroute.wire import PackedRows, load_to_message, pack_rows

PackRows: TypeAlias = Callable[[Tensor, common_pb2.Dtype.ValueType], PackedRows]
"""Puts rows [n, V] where the caller reads them, in a number format; unspecified = that of the rows."""


class Stepping:
    """Steps of the model that serves.

    Args:
        served: its engine does the work and judges the state of sessions.
        slot: what this expert is in the router's checkpoint.
        max_message_bytes: answers that would be larger are refused before they are computed.
    """

    def __init__(self, served: ServedModel, slot: str, max_message_bytes: int) -> None:
        self._served = served
        self._slot = slot
        self._max_message_bytes = max_message_bytes

    def begin(self, request: expert_pb2.StepRequest, timeout_seconds: float | None) -> BegunStep:
        """Hands a step to the engine.

        Args:
            request: what is wanted.
            timeout_seconds: when nobody will wait any more, from now; None = never.

        Raises:
            InvalidRequest: for what the engine does not look at.
        """
        arrived = time.monotonic()
        held = self._served.hold()
        try:
            facts = held.engine.facts
            deadline = None if timeout_seconds is None else arrived + timeout_seconds
            checks.check_answer_size([request], facts, self._max_message_bytes)
            checks.check_step(request, facts)
            future = held.engine.submit(_step_call(request, deadline))
        except FusionRouteError as error:
            held.release()
            watching.note_failed_step(self._slot, error.reason.value, arrived)
            raise
        return BegunStep(request, held, self._slot, arrived, future)

    def let_go(self, closings: Iterable[expert_pb2.CloseSessionRequest]) -> None:
        """Begins to forget sessions; nobody is told."""
        wanted = [Closing(each.session_id, each.fence, not each.may_share) for each in closings]
        self._served.engine.let_go(wanted)


class BegunStep:
    """A step in the engine.

    Attributes:
        future: done when it has ended; cancelling it gives it up.
    """

    __slots__ = ("_arrived", "_held", "_request", "_slot", "future")

    def __init__(
        self,
        request: expert_pb2.StepRequest,
        held: Held,
        slot: str,
        arrived: float,
        future: asyncio.Future[StepOutcome],
    ) -> None:
        self._request, self._held, self._slot, self._arrived = request, held, slot, arrived
        self.future = future
        if future.done():
            held.release()
        else:
            future.add_done_callback(held.released)

    def response(self) -> expert_pb2.StepResponse:
        """The whole answer to a step that has ended. Raises as `answer`."""
        response, data = self.answer(pack_rows)
        if data is not None:
            response.rows.data = bytes(data)
        return response

    def answer(self, pack: PackRows) -> tuple[expert_pb2.StepResponse, memoryview | None]:
        """The answer to a step that has ended, and the bytes of its rows, which are not in it yet.

        Raises:
            FusionRouteError: as the engine did.
            CancelledError: it was given up.
        """
        try:
            outcome = self.future.result()
        except FusionRouteError as error:
            watching.note_failed_step(self._slot, error.reason.value, self._arrived)
            raise
        num_tokens = len(self._request.token_ids) + len(outcome.drafted_ids)
        watching.note_step(self._slot, num_tokens, outcome, self._arrived)
        engine = self._held.engine
        rows, top = self._shown(outcome, pack)
        response = expert_pb2.StepResponse(
            rows=None if rows is None else rows.matrix,
            top=top,
            position=outcome.position,
            drafted_ids=outcome.drafted_ids,
            epoch=engine.facts.epoch,
            timings=expert_pb2.StepTimings(
                queue_seconds=outcome.queue_seconds,
                forward_seconds=outcome.forward_seconds,
                num_forwards=outcome.num_forwards,
                max_batch_sessions=outcome.max_batch_sessions,
            ),
            load=load_to_message(engine.load()),
            num_computed_tokens=outcome.num_computed_tokens,
        )
        return response, None if rows is None else rows.data

    def _shown(
        self, outcome: StepOutcome, pack: PackRows
    ) -> tuple[PackedRows | None, expert_pb2.TopLogits | None]:
        """The rows, or the highest logits of each where only these were asked for."""
        request = self._request
        if not request.top_logits:
            return pack(outcome.rows, request.dtype), None
        ids, logits = top_of_rows(outcome.rows, request.top_logits)
        return None, top_logits_to_message(ids, logits, request.dtype)


def _step_call(request: expert_pb2.StepRequest, deadline: float | None) -> StepCall:
    return StepCall(
        session_id=request.session_id,
        from_position=request.from_position,
        token_ids=list(request.token_ids),
        num_rows=request.num_rows,
        expected_epoch=request.expected_epoch,
        fence=request.fence,
        prefix_digest=request.prefix_digest if request.HasField("prefix_digest") else None,
        deadline=deadline,
        row_indices=tuple(request.row_indices),
        exact=request.exact,
        draft=_draft(request) if request.draft_tokens else None,
        keep_rows=request.top_logits > 0,
    )


def _draft(request: expert_pb2.StepRequest) -> Draft:
    choice = request.draft_choice
    sampling = Sampling(
        temperature=choice.temperature,
        top_k=choice.top_k,
        top_p=choice.top_p or 1.0,
        min_p=choice.min_p,
        seed=choice.seed,
    )
    return Draft(request.draft_tokens, sampling, choice.min_probability, frozenset(choice.end_ids))
