"""Forwards of one to a few rows at the speed of memory, compiled by numba for this machine.

Only imported, by `engine.row_products`, where numba is there. Number formats as in `row_intrinsics`; sums in float32.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from fusionroute.engine.kernel_cache import is_cached
from fusionroute.engine.row_intrinsics import bytes_of, load, store
from fusionroute.engine.row_tiles import (
    first_4_1,
    first_4_2,
    first_4_4,
    first_8_2,
    first_16_1,
    row_bytes,
    tile_1_1,
    tile_4_1,
    tile_4_2,
    tile_4_4,
)

_inner = njit(nogil=True)
_outer = njit(nogil=True, cache=is_cached())


@_inner
def product(
    tag: Any, kept: Any, out_tag: Any, size: int, weight: int, bias: int, rows: int, out: int,
    start: int, stop: int, num_outputs: int, length: int, num_rows: int,
) -> None:  # fmt: skip
    """out [rows, outputs] = rows [rows, length] times weight [outputs, length], for outputs from start on.

    Rows are in the format that such weights are multiplied with: see `ready`. Each row of weights is read from memory
    once. A row's result has the same bits whatever other rows there are. Numbers are rounded to the format `kept` and
    stored as `out_tag`.
    """
    row_size, out_size = row_bytes(tag), bytes_of(out_tag)
    o = start
    while num_rows == 1 and o + 16 <= stop:
        w, add, to = weight + o * length * size, bias + o * size if bias != 0 else 0, out + o * out_size
        first_16_1(tag, kept, out_tag, w, add, rows, to, num_outputs, length)
        o += 16
    while num_rows == 2 and o + 8 <= stop:
        w, add, to = weight + o * length * size, bias + o * size if bias != 0 else 0, out + o * out_size
        first_8_2(tag, kept, out_tag, w, add, rows, to, num_outputs, length)
        o += 8
    while o + 4 <= stop:
        w, add, to = weight + o * length * size, bias + o * size if bias != 0 else 0, out + o * out_size
        if num_rows >= 4:
            first_4_4(tag, kept, out_tag, w, add, rows, to, num_outputs, length)
            r = 4
        elif num_rows >= 2:
            first_4_2(tag, kept, out_tag, w, add, rows, to, num_outputs, length)
            r = 2
        else:
            first_4_1(tag, kept, out_tag, w, add, rows, to, num_outputs, length)
            r = 1
        while r + 4 <= num_rows:
            mine, there = rows + r * length * row_size, to + r * num_outputs * out_size
            tile_4_4(tag, kept, out_tag, w, add, mine, there, num_outputs, length)
            r += 4
        if r + 2 <= num_rows:
            mine, there = rows + r * length * row_size, to + r * num_outputs * out_size
            tile_4_2(tag, kept, out_tag, w, add, mine, there, num_outputs, length)
            r += 2
        if r < num_rows:
            mine, there = rows + r * length * row_size, to + r * num_outputs * out_size
            tile_4_1(tag, kept, out_tag, w, add, mine, there, num_outputs, length)
        o += 4
    while o < stop:
        w, add, to = weight + o * length * size, bias + o * size if bias != 0 else 0, out + o * out_size
        for r in range(num_rows):
            mine, there = rows + r * length * row_size, to + r * num_outputs * out_size
            tile_1_1(tag, kept, out_tag, w, add, mine, there, num_outputs, length)
        o += 1


@_inner
def ready(tag: Any, rows: int, count: int, room: int) -> int:
    """The address of so many float32 numbers, representable in the tag's format, as `product` wants its rows."""
    if row_bytes(tag) == 4:
        return rows
    for i in range(count):
        store(tag, room, i, load(np.float32(0), rows, i))
    return room


@_inner
def _linear(
    tag: Any, size: int, weight: int, bias: int, rows: int, out: int,
    start: int, stop: int, num_outputs: int, length: int, num_rows: int,
) -> None:  # fmt: skip
    if row_bytes(tag) == size:
        product(tag, tag, tag, size, weight, bias, rows, out, start, stop, num_outputs, length, num_rows)
        return
    floats = np.empty(num_rows * length + 1, np.float32)
    for i in range(num_rows * length):
        floats[i] = load(tag, rows, i)
    product(
        tag, tag, tag, size, weight, bias, floats.ctypes.data, out, start, stop, num_outputs, length, num_rows
    )  # fmt: skip
    floats[0] = 0.0  # numba frees an array after its last use, and an address is none


@_outer
def linear_bfloat16(
    weight: int, bias: int, rows: int, out: int,
    start: int, stop: int, num_outputs: int, length: int, num_rows: int,
) -> None:  # fmt: skip
    """rows [n, length] times weight [outputs, length], plus bias unless 0, to out [n, outputs]."""
    _linear(np.uint16(0), 2, weight, bias, rows, out, start, stop, num_outputs, length, num_rows)


@_outer
def linear_float16(
    weight: int, bias: int, rows: int, out: int,
    start: int, stop: int, num_outputs: int, length: int, num_rows: int,
) -> None:  # fmt: skip
    """As `linear_bfloat16`."""
    _linear(np.int16(0), 2, weight, bias, rows, out, start, stop, num_outputs, length, num_rows)


@_outer
def linear_float32(
    weight: int, bias: int, rows: int, out: int,
    start: int, stop: int, num_outputs: int, length: int, num_rows: int,
) -> None:  # fmt: skip
    """As `linear_bfloat16`."""
    _linear(np.float32(0), 4, weight, bias, rows, out, start, stop, num_outputs, length, num_rows)


LINEAR_SIGNATURE = "void(int64,int64,int64,int64,int64,int64,int64,int64,int64)"
