"""Answers of a stream as bytes: the contract's own messages, whoever puts them together or takes them apart."""

from __future__ import annotations

import pytest
from google.protobuf.message import DecodeError
from hypothesis import given, settings
from hypothesis import strategies as st

from fusionroute import streamed_rows
from fusionroute.streamed_rows import StreamedAnswer, StreamedAnswers
from fusionroute.v1 import common_pb2, expert_pb2


@st.composite
def answers(draw: st.DrawFn) -> StreamedAnswers:
    """Some with rows, which may be long, some with errors."""
    made = []
    for step_id in draw(st.lists(st.integers(0, 2**64 - 1), max_size=4, unique=True)):
        if draw(st.booleans()):
            error = expert_pb2.StepError(code=3, reason="INVALID_FIELD", metadata={"field": draw(st.text())})
            made.append(StreamedAnswer(step_id, expert_pb2.StepResult(error=error)))
            continue
        data = draw(st.binary(max_size=20)) * draw(st.sampled_from([0, 1, 7000]))
        rows = common_pb2.Matrix(dtype=common_pb2.DTYPE_BFLOAT16, num_rows=draw(st.integers(0, 300)), width=7)
        response = expert_pb2.StepResponse(rows=rows, position=draw(st.integers(0, 2**32 - 1)), epoch=5)
        result = expert_pb2.StepResult(response=response)
        made.append(StreamedAnswer(step_id, result, memoryview(data)))
    return StreamedAnswers(draw(st.booleans()), made)


def whole(answer: StreamedAnswer) -> expert_pb2.StreamedResult:
    """The message as protobuf knows it."""
    message = expert_pb2.StreamedResult(id=answer.step_id, result=answer.result)
    if answer.data is not None and answer.data.nbytes:
        message.result.response.rows.data = bytes(answer.data)
    return message


@settings(max_examples=60, deadline=None)
@given(answers())
def test_protobuf_reads_what_was_put_together(message: StreamedAnswers) -> None:
    read = expert_pb2.StepStreamResponse.FromString(streamed_rows.encode(message))
    assert read.shared_memory_accepted == message.shared_memory_accepted
    assert list(read.results) == [whole(answer) for answer in message.answers]


@settings(max_examples=60, deadline=None)
@given(answers(), st.booleans())
def test_what_is_taken_apart_is_what_protobuf_wrote(message: StreamedAnswers, is_protobufs: bool) -> None:
    theirs = expert_pb2.StepStreamResponse(
        shared_memory_accepted=message.shared_memory_accepted, results=map(whole, message.answers)
    )
    data = theirs.SerializeToString() if is_protobufs else streamed_rows.encode(message)
    read = streamed_rows.decode(data)
    assert read.shared_memory_accepted == message.shared_memory_accepted
    assert [whole(answer) for answer in read.answers] == list(theirs.results)
    if len(data) >= streamed_rows.LEAST_BYTES:
        longest = max(message.answers, key=lambda answer: answer.num_bytes)
        mine = next(answer for answer in read.answers if answer.step_id == longest.step_id)
        assert mine.data is not None and mine.data.obj is data, "not copied"


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=60), st.integers(0, 100))
def test_bytes_that_are_no_message_are_refused_or_read(noise: bytes, at: int) -> None:
    rows = expert_pb2.StepResult(
        response=expert_pb2.StepResponse(rows=common_pb2.Matrix(num_rows=1, width=9))
    )
    right = streamed_rows.encode(StreamedAnswers(True, [StreamedAnswer(1, rows, memoryview(bytes(20_000)))]))
    for data in (noise * 400, right[:at] + noise + right[at:], right[: -at or None]):
        try:
            streamed_rows.decode(data)
        except (DecodeError, ValueError, UnicodeDecodeError):
            continue


def test_a_field_longer_than_its_message_is_refused() -> None:
    with pytest.raises(ValueError, match="longer than its message"):
        streamed_rows.decode(b"\x0a\xff\xff\x7f" + bytes(20_000))
