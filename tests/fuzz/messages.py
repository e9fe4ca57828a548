"""Malformed requests, drawn from a seed: bytes that are no message, and messages that say impossible things."""

from __future__ import annotations

import random
from collections.abc import Callable
from enum import Enum
from typing import Any

from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass

STRINGS = (
    "",
    " ",
    "\0",
    "a/b",
    "../../etc/passwd",
    "x" * 300,
    "é\u202e\U0001f600",
    "%s{0}",
    "*",
    "math",
    "s" * 65,
)
FLOATS = (float("nan"), float("inf"), float("-inf"), -0.0, -1.0, 1e38, 0.5, 1e-40, 3.0)
MOST_REPEATED = 3000
MOST_NESTED = 300  # more of them would be slow to draw, not to refuse


class Kind(Enum):
    """How a request is malformed."""

    RANDOM_BYTES = "random bytes"
    DAMAGED = "damaged bytes of a valid message"
    MUTATED = "a valid message with wild values"
    WILD = "a message of wild values"


def draw(rng: random.Random, valid: Message) -> tuple[Kind, bytes]:
    """One request of the type of `valid`."""
    kind = rng.choice(list(Kind))
    match kind:
        case Kind.RANDOM_BYTES:
            return kind, rng.randbytes(rng.choice([1, 2, 7, 40, 400, 5000]))
        case Kind.DAMAGED:
            return kind, _damaged(rng, valid.SerializeToString())
        case Kind.MUTATED:
            message = type(valid)()
            message.CopyFrom(valid)
            for _ in range(rng.randint(1, 3)):
                _set_wild(rng, message, depth=0)
            return kind, message.SerializeToString()
        case Kind.WILD:
            return kind, _wild(rng, valid.DESCRIPTOR, depth=0).SerializeToString()


def _damaged(rng: random.Random, data: bytes) -> bytes:
    damaged = bytearray(data or b"\x0a")
    for _ in range(rng.randint(1, 4)):
        match rng.randrange(4):
            case 0:
                damaged[rng.randrange(len(damaged))] ^= 1 << rng.randrange(8)
            case 1 if len(damaged) > 1:
                del damaged[rng.randrange(1, len(damaged)) :]
            case 2:
                damaged += rng.randbytes(rng.randint(1, 20))
            case _:
                damaged[rng.randrange(len(damaged))] = rng.randrange(256)
    return bytes(damaged)


def _wild(rng: random.Random, descriptor: Descriptor, depth: int) -> Message:
    message = GetMessageClass(descriptor)()
    for _ in range(rng.randint(0, len(descriptor.fields))):
        _set_wild(rng, message, depth)
    return message


def _set_wild(rng: random.Random, message: Message, depth: int) -> None:
    """Gives one field, or one of a message within, a value that nobody expects."""
    if not message.DESCRIPTOR.fields:
        return
    fields: list[Any] = list(message.DESCRIPTOR.fields)
    field = rng.choice(fields)
    value: Any = getattr(message, field.name)
    is_map: bool = field.message_type is not None and field.message_type.GetOptions().map_entry
    if is_map:
        key, entry = field.message_type.fields_by_name["key"], field.message_type.fields_by_name["value"]
        if entry.message_type is None:
            for _ in range(rng.choice([1, 5, 1100])):
                value[_scalar(rng, key)] = _scalar(rng, entry)
    elif field.is_repeated:
        most = MOST_REPEATED if depth == 0 and field.message_type is None else MOST_NESTED
        count = rng.choice([0, 1, 2, most])
        if field.message_type is not None:
            value.extend(_wild(rng, field.message_type, depth + 1) for _ in range(count if depth < 2 else 0))
        else:
            value.extend(_scalar(rng, field) for _ in range(count))
    elif field.message_type is not None:
        value.CopyFrom(_wild(rng, field.message_type, depth + 1) if depth < 4 else value)
    else:
        setattr(message, field.name, _scalar(rng, field))


def _integer(bits: int, *, signed: bool) -> Callable[[random.Random], int]:
    highest = 2 ** (bits - 1) - 1 if signed else 2**bits - 1
    lowest = -(2 ** (bits - 1)) if signed else 0
    return lambda rng: rng.choice([0, 1, 7, 60, 61, 96, 97, lowest, highest, rng.randint(lowest, highest)])


_SCALARS: dict[int, Callable[[random.Random], Any]] = {
    FieldDescriptor.CPPTYPE_INT32: _integer(32, signed=True),
    FieldDescriptor.CPPTYPE_UINT32: _integer(32, signed=False),
    FieldDescriptor.CPPTYPE_INT64: _integer(64, signed=True),
    FieldDescriptor.CPPTYPE_UINT64: _integer(64, signed=False),
    FieldDescriptor.CPPTYPE_FLOAT: lambda rng: rng.choice(FLOATS),
    FieldDescriptor.CPPTYPE_DOUBLE: lambda rng: rng.choice(FLOATS),
    FieldDescriptor.CPPTYPE_BOOL: lambda rng: rng.random() < 0.5,
    FieldDescriptor.CPPTYPE_ENUM: lambda rng: rng.choice([-1, 0, 1, 2, 3, 99, 2**31 - 1]),
}


def _scalar(rng: random.Random, field: FieldDescriptor) -> Any:
    if field.cpp_type == FieldDescriptor.CPPTYPE_STRING:
        if field.type == FieldDescriptor.TYPE_BYTES:
            return rng.randbytes(rng.choice([0, 3, 64, 5000]))
        return rng.choice(STRINGS)
    return _SCALARS[field.cpp_type](rng)
