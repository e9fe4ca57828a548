"""Answers of a stream of steps as bytes, so that rows are copied once on each side instead of once per nested message.

The messages are those of the contract, only put together and taken apart here: protobuf would copy a row into each
message that encloses it, and once more each time it is read. Any other implementation may sit at the other end.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from fusionroute.v1 import common_pb2, expert_pb2

LEAST_BYTES = 16_384
"""A smaller message is protobuf's: it copies faster than this module counts."""

_VARINT, _LENGTH = 0, 2
_RESULTS = expert_pb2.StepStreamResponse.RESULTS_FIELD_NUMBER
_ID = expert_pb2.StreamedResult.ID_FIELD_NUMBER
_RESULT = expert_pb2.StreamedResult.RESULT_FIELD_NUMBER
_RESPONSE = expert_pb2.StepResult.RESPONSE_FIELD_NUMBER
_ROWS = expert_pb2.StepResponse.ROWS_FIELD_NUMBER
_DATA = common_pb2.Matrix.DATA_FIELD_NUMBER


@dataclass(frozen=True, slots=True)
class StreamedAnswer:
    """An answer on a stream.

    Attributes:
        step_id: of the step.
        result: how it ended.
        data: bytes of its rows where they are not in `result`.
    """

    step_id: int
    result: expert_pb2.StepResult
    data: memoryview | None = None

    @property
    def num_bytes(self) -> int:
        """Roughly, in a message."""
        return 256 if self.data is None else 256 + self.data.nbytes


@dataclass(frozen=True, slots=True)
class StreamedAnswers:
    """A message of a stream.

    Attributes:
        shared_memory_accepted: see the contract.
        answers: the steps that have ended.
    """

    shared_memory_accepted: bool
    answers: Sequence[StreamedAnswer]


def encode(message: StreamedAnswers) -> bytes:
    """The bytes of a StepStreamResponse; rows are copied once."""
    head = expert_pb2.StepStreamResponse(shared_memory_accepted=message.shared_memory_accepted)
    pieces: list[bytes | memoryview] = [head.SerializeToString()]
    for answer in message.answers:
        pieces += _encoded(answer)
    return b"".join(pieces)


def _encoded(answer: StreamedAnswer) -> list[bytes | memoryview]:
    pieces: list[bytes | memoryview] = [answer.result.SerializeToString()]
    if answer.data is not None:
        # A message that comes in two parts is the two merged: the rows' head came with the result.
        pieces.append(answer.data)
        for field in (_DATA, _ROWS, _RESPONSE):
            num_bytes = sum(map(len, pieces[1:]))
            pieces.insert(1, _tag(field, _LENGTH) + _varint(num_bytes))
    num_bytes = sum(map(len, pieces))
    head = _tag(_ID, _VARINT) + _varint(answer.step_id) + _tag(_RESULT, _LENGTH) + _varint(num_bytes)
    return [_tag(_RESULTS, _LENGTH) + _varint(len(head) + num_bytes) + head, *pieces]


def decode(data: bytes) -> StreamedAnswers:
    """A StepStreamResponse, its rows not copied.

    Raises:
        ValueError, google.protobuf.message.DecodeError: these bytes are none.
    """
    if len(data) < LEAST_BYTES:
        message = expert_pb2.StepStreamResponse.FromString(data)
        answers = [StreamedAnswer(each.id, each.result) for each in message.results]
        return StreamedAnswers(message.shared_memory_accepted, answers)
    results, rest = _taken(memoryview(data), _RESULTS)
    head = expert_pb2.StepStreamResponse.FromString(rest)
    return StreamedAnswers(head.shared_memory_accepted, [_decoded(each) for each in results])


def _decoded(result: memoryview) -> StreamedAnswer:
    results, rest = _taken(result, _RESULT)
    head = expert_pb2.StreamedResult.FromString(rest)
    rows = list[memoryview]()
    for step_result in results:
        responses, rest = _taken(step_result, _RESPONSE)
        head.result.MergeFromString(rest)
        for response in responses:
            matrices, rest = _taken(response, _ROWS)
            head.result.response.MergeFromString(rest)
            for matrix in matrices:
                found, rest = _taken(matrix, _DATA)
                head.result.response.rows.MergeFromString(rest)
                rows += found
    return StreamedAnswer(head.id, head.result, rows[-1] if rows else None)


def _taken(message: memoryview, field: int) -> tuple[list[memoryview], bytes]:
    """The occurrences of a field of bytes or messages, and all else of a message."""
    wanted = _tag(field, _LENGTH)[0]
    found: list[memoryview] = []
    rest: list[memoryview] = []
    for tag, begin, start, stop in _fields(message):
        if tag == wanted:
            found.append(message[start:stop])
        else:
            rest.append(message[begin:stop])
    return found, b"".join(rest)


def _fields(message: memoryview) -> Iterator[tuple[int, int, int, int]]:
    """Of each field: its tag, where it begins, where its content does, where it stops."""
    stop = 0
    while stop < len(message):
        begin = stop
        tag, start = _read_varint(message, begin)
        match tag & 7:
            case 0:
                _, stop = _read_varint(message, start)
            case 1:
                stop = start + 8
            case 2:
                size, start = _read_varint(message, start)
                stop = start + size
            case 5:
                stop = start + 4
            case kind:
                raise ValueError(f"a field has wire type {kind}")
        if stop > len(message):
            raise ValueError("a field is longer than its message")
        yield tag, begin, start, stop


def _tag(field: int, kind: int) -> bytes:
    return bytes([field << 3 | kind])  # all fields used here are below 16


def _varint(value: int) -> bytes:
    pieces = bytearray()
    while value > 0x7F:
        pieces.append(value & 0x7F | 0x80)
        value >>= 7
    pieces.append(value)
    return bytes(pieces)


def _read_varint(message: memoryview, start: int) -> tuple[int, int]:
    """A number and where it stops."""
    value = shift = 0
    while start < len(message) and shift < 70:
        byte = message[start]
        start += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, start
        shift += 7
    raise ValueError("a number is cut off or too long")
