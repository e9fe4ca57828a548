"""Values as bytes between a program in the sandbox and who examines it: plain data, rebuilt from its parts.

What arrives was built here and has only built-in types, so that no ``__eq__`` of the program's own decides whether it
equals what a test expects. What is no plain data stays where it is and is spoken of by a number.
"""

from __future__ import annotations

import builtins
import json
import os
from collections.abc import Callable
from typing import Any

MAX_FRAME_BYTES = 16 << 20
_LARGEST_PLAIN_INTEGER = 1 << 60

Keep = Callable[[object], dict[str, Any]]
"""What stands for a value that is no plain data; raises TypeError where none can."""
Find = Callable[[str, int], object]
"""The value that ("its" or "mine", number) stands for."""


class PeerGone(Exception):
    """The other process has closed its end, or sent what is no frame."""


def send(descriptor: int, message: object) -> None:
    """Write one frame: its length in four bytes, then JSON."""
    data = json.dumps(message, separators=(",", ":")).encode()
    data = len(data).to_bytes(4, "little") + data
    try:
        while data:
            data = data[os.write(descriptor, data) :]
    except BrokenPipeError:
        raise PeerGone from None


def receive(descriptor: int) -> Any:
    """Read one frame.

    Raises:
        PeerGone: there is none, or one that is too long or no JSON.
    """
    length = int.from_bytes(_read(descriptor, 4), "little")
    if length > MAX_FRAME_BYTES:
        raise PeerGone(f"a value of {length} bytes; at most {MAX_FRAME_BYTES} are taken")
    data = _read(descriptor, length)
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise PeerGone(f"no frame: {type(error).__name__}") from None


def _read(descriptor: int, num_bytes: int) -> bytes:
    parts = []
    while num_bytes:
        part = os.read(descriptor, min(num_bytes, 1 << 20))
        if not part:
            raise PeerGone
        parts.append(part)
        num_bytes -= len(part)
    return b"".join(parts)


def pack(value: object, keep: Keep) -> Any:
    """A value as JSON has it; containers of unknown classes and all other objects by `keep`."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int):
        number = int(value)
        plain = -_LARGEST_PLAIN_INTEGER < number < _LARGEST_PLAIN_INTEGER
        return number if plain else {"t": "int", "v": f"{number:x}"}
    if isinstance(value, float):
        return float(value)
    if isinstance(value, str):
        return str.__str__(value)
    return _pack_container(value, keep)


def _pack_container(value: object, keep: Keep) -> Any:
    kind = type(value)
    if kind is list:
        return [pack(item, keep) for item in value]  # type: ignore[attr-defined]  # it is a list
    if isinstance(value, tuple) and (kind is tuple or hasattr(kind, "_fields")):
        return {"t": "tuple", "v": [pack(item, keep) for item in value]}
    if kind is set or kind is frozenset:
        return {"t": kind.__name__, "v": [pack(item, keep) for item in value]}  # type: ignore[attr-defined]
    if kind is dict or (isinstance(value, dict) and kind.__module__ == "collections"):
        return {"t": "dict", "v": [[pack(key, keep), pack(item, keep)] for key, item in value.items()]}  # type: ignore[attr-defined]
    if kind is bytes or kind is bytearray:
        return {"t": kind.__name__, "v": value.hex()}  # type: ignore[attr-defined]
    if kind is type and value in _BUILT_IN_TYPES:
        return {"t": "type", "v": _BUILT_IN_TYPES[value]}
    parts = _PARTS.get((kind.__module__, kind.__name__))
    if parts is not None:
        return {"t": f"{kind.__module__}.{kind.__name__}", "v": [pack(part, keep) for part in parts(value)]}
    return keep(value)


_BUILT_IN_TYPES: dict[object, str] = {
    value: name for name, value in vars(builtins).items() if isinstance(value, type)
}
_PARTS: dict[tuple[str, str], Callable[[Any], tuple[object, ...]]] = {
    ("builtins", "complex"): lambda value: (value.real, value.imag),
    ("builtins", "range"): lambda value: (value.start, value.stop, value.step),
    ("collections", "deque"): lambda value: (list(value), value.maxlen),
    ("fractions", "Fraction"): lambda value: (value.numerator, value.denominator),
    ("decimal", "Decimal"): lambda value: (str(value),),
    ("datetime", "date"): lambda value: (value.year, value.month, value.day),
    ("datetime", "timedelta"): lambda value: (value.days, value.seconds, value.microseconds),
    ("datetime", "datetime"): lambda value: (*tuple(value.timetuple()[:6]), value.microsecond),
}
_PLAIN_KINDS: dict[str, Callable[[Any], object]] = {
    "int": lambda value: int(value, 16),
    "type": lambda name: _built_in_type(name),
    "bytes": bytes.fromhex,
    "bytearray": bytearray.fromhex,
}
_COLLECTIONS: dict[str, Callable[[Any], object]] = {"tuple": tuple, "set": set, "frozenset": frozenset}


def _built_in_type(name: str) -> type:
    found = getattr(builtins, name, None)
    if not isinstance(found, type):
        raise TypeError(f"Python has no type {name!r}")
    return found


def unpack(packed: Any, find: Find) -> Any:
    """The value again.

    Raises:
        TypeError, ValueError, KeyError: it is none that `pack` writes.
    """
    if isinstance(packed, list):
        return [unpack(item, find) for item in packed]
    if not isinstance(packed, dict):
        return packed
    kind, value = packed["t"], packed["v"]
    if kind in ("its", "mine"):
        return find(kind, value)
    if kind in _PLAIN_KINDS:
        return _PLAIN_KINDS[kind](value)
    if kind == "dict":
        return {unpack(key, find): unpack(item, find) for key, item in value}
    items = [unpack(item, find) for item in value]
    if kind in _COLLECTIONS:
        return _COLLECTIONS[kind](items)
    module, _, name = kind.partition(".")
    if (module, name) not in _PARTS:
        raise TypeError(f"no value has the kind {kind!r}")
    return getattr(__import__(module), name)(*items)
