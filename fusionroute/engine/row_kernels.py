"""Forwards of one to a few rows at the speed of memory, compiled by numba for this machine.

Only imported, by `engine.row_products`, where numba is there. Number formats as in `row_intrinsics`; sums in float32.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from fusionroute.engine.kernel_cache import is_cached
from fusionroute.engine.row_intrinsics import (
    dot_1,
    dot_2,
    dot_4,
    load,
    rounded,
    store,
)

_inner = njit(nogil=True)
_outer = njit(nogil=True, cache=is_cached())


@_inner
def product(
    tag: Any, kept: Any, out_tag: Any, size: int, weight: int, bias: int, rows: int, out: int,
    start: int, stop: int, num_outputs: int, length: int, num_rows: int,
) -> None:  # fmt: skip
    """out [rows, outputs] = rows [rows, length] float32 times weight [outputs, length], for outputs from start on.

    Each row of weights is read once. A row's result has the same bits whatever other rows there are. Numbers are
    rounded to the format `kept` and stored as `out_tag`.
    """
    single = np.float32(0)
    for o in range(start, stop):
        w = weight + o * length * size
        add = single if bias == 0 else load(tag, bias, o)
        r = 0
        while r + 4 <= num_rows:
            four = dot_4(tag, w, rows + 4 * r * length, length, length)
            store(out_tag, out, r * num_outputs + o, rounded(kept, four[0] + add))
            store(out_tag, out, (r + 1) * num_outputs + o, rounded(kept, four[1] + add))
            store(out_tag, out, (r + 2) * num_outputs + o, rounded(kept, four[2] + add))
            store(out_tag, out, (r + 3) * num_outputs + o, rounded(kept, four[3] + add))
            r += 4
        if r + 2 <= num_rows:
            two = dot_2(tag, w, rows + 4 * r * length, length, length)
            store(out_tag, out, r * num_outputs + o, rounded(kept, two[0] + add))
            store(out_tag, out, (r + 1) * num_outputs + o, rounded(kept, two[1] + add))
            r += 2
        if r < num_rows:
            one = dot_1(tag, w, rows + 4 * r * length, length, length)
            store(out_tag, out, r * num_outputs + o, rounded(kept, one[0] + add))


@_inner
def _linear(
    tag: Any, size: int, weight: int, bias: int, rows: int, out: int,
    start: int, stop: int, num_outputs: int, length: int, num_rows: int,
) -> None:  # fmt: skip
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
    f32 = np.float32(0)
    product(f32, f32, f32, 4, weight, bias, rows, out, start, stop, num_outputs, length, num_rows)


LINEAR_SIGNATURE = "void(int64,int64,int64,int64,int64,int64,int64,int64,int64)"
