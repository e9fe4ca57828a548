"""Answers of a router that is sometimes away."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from fusionroute.errors import (
    FusionRouteError,
    InvalidRequest,
    OutOfRoom,
    Reason,
    SessionStateError,
    Unavailable,
)
from fusionroute.v1.router_pb2 import (
    CombineRule,
    Finished,
    FinishReason,
    GenerateRequest,
    GenerationEvent,
    Started,
    Token,
)
from trainer.answering import Answer, Ending, ServedAnswerer
from trainer.data import GoldPrompt

PROMPT = GoldPrompt("w2 w3", (2, 3), "w4", "file: line 1")


class MoodyRouter:
    """Breaks its streams off with the given errors, one each, before it answers "ab".

    Attributes:
        requests: what it was asked, every time.
        forgotten: sessions that were deleted.
    """

    def __init__(
        self, *moods: FusionRouteError, reason: FinishReason.ValueType = FinishReason.FINISH_REASON_EOS
    ) -> None:
        self.moods, self.reason = list(moods), reason
        self.requests: list[GenerateRequest] = []
        self.forgotten: list[str] = []

    async def generate(
        self, request: GenerateRequest, timeout_seconds: float
    ) -> AsyncIterator[GenerationEvent]:
        self.requests.append(request)
        yield GenerationEvent(started=Started(session_id=request.session_id, checkpoint="abc"))
        yield GenerationEvent(token=Token(index=0, id=5, text="a"))
        if self.moods:
            raise self.moods.pop(0)
        yield GenerationEvent(finished=Finished(reason=self.reason, text="b"))

    async def delete_session(self, session_id: str) -> bool:
        self.forgotten.append(session_id)
        return True


def ask(router: MoodyRouter, *, patience_seconds: float = 20.0) -> Answer:
    answerer = ServedAnswerer(router, "gated_sum", 7, patience_seconds)
    return asyncio.run(answerer.answer(PROMPT, 0.5, 11))


def test_the_question_is_the_prompts_tokens_with_rule_budget_temperature_and_seed():
    router = MoodyRouter()
    assert ask(router) == Answer("ab", Ending.ENDED, "abc")
    (request,) = router.requests
    assert list(request.token_ids.ids) == [2, 3]
    assert request.combine == CombineRule.COMBINE_RULE_GATED_SUM
    sampling = request.sampling
    assert (sampling.max_tokens, sampling.temperature, sampling.seed) == (7, 0.5, 11)
    assert router.forgotten == [request.session_id]


def test_a_stream_that_breaks_is_followed_as_the_same_request():
    away = Unavailable(Reason.DRAINING, "restarting")
    busy = SessionStateError(Reason.SESSION_BUSY, "its writer died", retry_after_seconds=0.01)
    full = OutOfRoom(Reason.QUEUE_FULL, "256 turns are running")
    router = MoodyRouter(away, busy, full)
    assert ask(router).text == "ab"
    assert len(router.requests) == 4
    assert len({(request.session_id, request.request_id) for request in router.requests}) == 1
    assert router.requests[0].request_id


def test_patience_has_an_end():
    router = MoodyRouter(*[Unavailable(Reason.DRAINING, "gone for good")] * 50)
    with pytest.raises(Unavailable, match="gone for good"):
        ask(router, patience_seconds=0.5)


def test_what_time_cannot_mend_is_raised_at_once():
    router = MoodyRouter(InvalidRequest(Reason.RULE_NOT_AVAILABLE, "no gate"))
    with pytest.raises(InvalidRequest, match="no gate"):
        ask(router)
    assert len(router.requests) == 1


def test_a_prompt_that_is_too_long_has_no_answer():
    router = MoodyRouter(InvalidRequest(Reason.CONTEXT_FULL, "too long"))
    assert ask(router).ending is Ending.REFUSED


@pytest.mark.parametrize(
    ("reason", "ending"),
    [
        (FinishReason.FINISH_REASON_LENGTH, Ending.CUT),
        (FinishReason.FINISH_REASON_CONTEXT, Ending.CUT),
        (FinishReason.FINISH_REASON_CANCELLED, Ending.REFUSED),
    ],
)
def test_how_an_answer_ended_is_kept(reason: FinishReason.ValueType, ending: Ending):
    assert ask(MoodyRouter(reason=reason)).ending is ending
