"""The judge of the kill matrix sees each wrong that a stream can suffer: else the matrix would prove nothing."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from fusionroute.fusion import Sampling
from fusionroute.v1.router_pb2 import Finished, GenerationEvent, Token
from tests.chaos.faults import Cell, Component, Fault, Hit
from tests.chaos.judge import Judgement, epochs_back, judge_streams, undisturbed_cases
from tests.chaos.load import Stream
from tests.equivalence import Case
from tests.reference import ReferenceToken

CELL = Cell(Component.EXPERT, Fault.KILL)
IDS = [5, 9, 7, 9]


def case(margin: float = 1.0) -> Case:
    return Case([2, 3], "sum", Sampling(), [ReferenceToken(i, 0, -1.0, margin) for i in IDS], 4, True)


def token(index: int, **changes: object) -> Token:
    facts = {"index": index, "id": IDS[index], "logprob": -1.0, "expert": "math", "expert_epoch": 7}
    return Token(**(facts | changes))


def stream_of(*tokens: Token, finished: bool = True) -> Stream:
    stream = Stream(case())
    for each in tokens:
        stream.take(GenerationEvent(token=each))
    if finished:
        stream.take(GenerationEvent(finished=Finished(num_generated_tokens=len(IDS))))
    return stream


def judge(stream: Stream, expected: Case | None = None) -> Judgement:
    return judge_streams(CELL, Hit("expert", (stream,)), [stream], [expected or case()])


def test_a_stream_that_is_as_undisturbed_passes() -> None:
    judgement = judge(stream_of(*map(token, range(4))))
    assert judgement.passed and judgement.num_equal == judgement.num_complete == 1


WRONGS: dict[str, Callable[[], Stream]] = {
    "incomplete": lambda: stream_of(token(0), token(1), finished=False),
    "missing": lambda: stream_of(token(0), token(1), token(3)),
    "repeated": lambda: stream_of(token(0), token(1), token(1), token(2), token(3)),
    "short": lambda: stream_of(token(0), token(1), token(2)),
    "other": lambda: stream_of(token(0), token(1, id=8), token(2), token(3)),
    "otherwise probable": lambda: stream_of(token(0), token(1, logprob=-1.5), token(2), token(3)),
    "degraded": lambda: stream_of(token(0), token(1, degraded=True), token(2), token(3)),
    "epoch back": lambda: stream_of(token(0), token(1), token(2, expert_epoch=6), token(3)),
}


@pytest.mark.parametrize("wrong", WRONGS)
def test_a_stream_that_is_wrong_fails_the_cell(wrong: str) -> None:
    assert not judge(WRONGS[wrong]()).passed


def test_epochs_of_different_slots_have_nothing_to_do_with_each_other() -> None:
    streams = stream_of(token(0), token(1, expert="strings", expert_epoch=3), token(2), token(3))
    assert not epochs_back(streams)


def test_a_float_tie_is_counted_apart_and_does_not_fail() -> None:
    judgement = judge(stream_of(token(0), token(1, id=8), token(2), token(3)), case(margin=1e-6))
    assert judgement.passed and judgement.num_ties == 1 and judgement.num_equal == 0


def test_after_its_own_float_tie_the_undisturbed_run_is_wanted_without_any_mercy() -> None:
    undisturbed = stream_of(token(0), token(1, id=8), token(2, id=11), token(3, id=12))
    expected = undisturbed_cases([case(margin=1e-6)], [undisturbed])[0]
    assert [wanted.id for wanted in expected.wanted] == [5, 8, 11, 12]
    assert not judge(stream_of(token(0), token(1, id=8), token(2, id=9), token(3, id=12)), expected).passed


def test_the_longest_pause_includes_the_wait_for_the_end() -> None:
    stream = stream_of(*map(token, range(4)))
    stream.started_at, stream.arrivals, stream.ended_at = 10.0, [11.0, 11.5, 14.0, 14.5], 18.5
    assert stream.longest_pause_seconds == 4.0
