"""What process 0 of a split model tells the others before each forward, as bytes."""

from __future__ import annotations

import json
import struct
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

Plain: TypeAlias = str | int | list[list[str | int]]

_HEADER_LENGTH = struct.Struct("!I")


@dataclass(frozen=True, slots=True)
class CacheCall:
    """A change of the sessions' caches: a method of `KVCache` and its arguments."""

    method: str
    arguments: tuple[Plain, ...]


@dataclass(frozen=True, slots=True)
class SegmentPlace:
    """A segment of the row with its session's id in place of its cache."""

    session_id: str
    past: int
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class ForwardOrder:
    """One forward, and what has become of the caches since the one before.

    Attributes:
        cache_calls: to be carried out first, in this order.
        segments, token_ids, positions, wanted, exact: as `LoadedModel.forward` takes them.
    """

    cache_calls: Sequence[CacheCall]
    segments: Sequence[SegmentPlace]
    token_ids: Sequence[int]
    positions: Sequence[int]
    wanted: Sequence[int]
    exact: bool = False


def pack(order: ForwardOrder) -> bytes:
    """As bytes: the length of a JSON header, the header, then three rows of 32-bit integers."""
    header = json.dumps(
        {
            "calls": [[call.method, *call.arguments] for call in order.cache_calls],
            "segments": [[s.session_id, s.past, s.start, s.stop] for s in order.segments],
            "counts": [len(order.token_ids), len(order.positions), len(order.wanted)],
            "exact": order.exact,
        }
    ).encode()
    numbers = array("i", order.token_ids)
    numbers.extend(order.positions)
    numbers.extend(order.wanted)
    return _HEADER_LENGTH.pack(len(header)) + header + numbers.tobytes()


def unpack(data: bytes) -> ForwardOrder:
    """What `pack` has packed; both ends run the same program."""
    (length,) = _HEADER_LENGTH.unpack_from(data)
    body = _HEADER_LENGTH.size + length
    header = json.loads(data[_HEADER_LENGTH.size : body])
    numbers = array("i")
    numbers.frombytes(data[body:])
    num_tokens, num_positions, _ = header["counts"]
    return ForwardOrder(
        cache_calls=[CacheCall(method, tuple(arguments)) for method, *arguments in header["calls"]],
        segments=[SegmentPlace(*place) for place in header["segments"]],
        token_ids=numbers[:num_tokens].tolist(),
        positions=numbers[num_tokens : num_tokens + num_positions].tolist(),
        wanted=numbers[num_tokens + num_positions :].tolist(),
        exact=header["exact"],
    )
