"""All layers of a plain Llama, Qwen2 or Qwen3 for one to a few rows, as one call; beside `row_kernels`.

    embed -> [norm, qkv, rotate, write keys and values, attend, o] + -> [norm, gate and up, silu, down] + -> ... -> norm

Rows are float32 on the way, rounded to the model's format wherever torch would keep a tensor.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from fusionroute.engine.kernel_cache import is_cached
from fusionroute.engine.row_intrinsics import load, power_of_two, rounded, store
from fusionroute.engine.row_kernels import product, ready
from fusionroute.engine.row_tiles import dot, row_bytes, weighted_1, weighted_4

MODEL_FIELDS, LAYER_FIELDS, ROW_FIELDS = 8, 16, 4
"""Numbers in the tables before the first layer, of each layer, and of each row before its caches: see `row_step`."""

_inner = njit(nogil=True)
_outer = njit(nogil=True, cache=is_cached())


@_inner
def _exp(x: Any) -> Any:
    """e ** x to two units in the last place, for x from -87 to 88; beyond, as at the ends. Vectorised."""
    x = min(max(x, np.float32(-87.0)), np.float32(88.0))
    shift = np.float32(12582912.0)  # 1.5 * 2**23: adding it rounds to a whole number
    whole = (x * np.float32(1.44269504088896) + shift) - shift
    r = x - whole * np.float32(0.693359375)
    r = r - whole * np.float32(-2.12194440e-4)
    p = np.float32(1.9875691500e-4)
    p = p * r + np.float32(1.3981999507e-3)
    p = p * r + np.float32(8.3334519073e-3)
    p = p * r + np.float32(4.1665795894e-2)
    p = p * r + np.float32(1.6666665459e-1)
    p = p * r + np.float32(5.0000001201e-1)
    return (p * r * r + r + np.float32(1.0)) * power_of_two(np.int32(whole))


@_inner
def _normed(
    tag: Any, rows: int, scale: int, floor_squared: float, out: int, num_rows: int, length: int
) -> None:
    """As `RowNorm`; `out` may be `rows`."""
    f32 = np.float32(0)
    for r in range(num_rows):
        row, to = rows + 4 * r * length, out + 4 * r * length
        squares = dot(row, row, length)
        factor = np.float32(1.0) / np.sqrt(squares + floor_squared)
        for i in range(length):
            store(f32, to, i, rounded(tag, load(f32, row, i) * factor * load(f32, scale, i)))


@_inner
def _add(tag: Any, rows: int, added: int, count: int) -> None:
    f32 = np.float32(0)
    for i in range(count):
        store(f32, rows, i, rounded(tag, load(f32, rows, i) + load(f32, added, i)))


@_inner
def _activate(tag: Any, gates: int, out: int, num_rows: int, inner: int) -> None:
    """silu(gate) * up, of rows [gates, ups]."""
    f32, one = np.float32(0), np.float32(1.0)
    for r in range(num_rows):
        gate, up, to = gates + 8 * r * inner, gates + 8 * r * inner + 4 * inner, out + 4 * r * inner
        for i in range(inner):
            g = load(f32, gate, i)
            active = rounded(tag, g / (one + _exp(-g)))
            store(f32, to, i, rounded(tag, active * load(f32, up, i)))


@_inner
def _rotate(tag: Any, size: int, heads: int, num_heads: int, length: int, angles: int) -> None:
    """Heads [num_heads, length] turned in place; angles: cosines, then signed sines."""
    f32, half = np.float32(0), length // 2
    sines = angles + length * size
    for h in range(num_heads):
        head = heads + 4 * h * length
        for i in range(half):
            a, b = load(f32, head, i), load(f32, head, i + half)
            first = a * load(tag, angles, i) + b * load(tag, sines, i)
            second = b * load(tag, angles, i + half) + a * load(tag, sines, i + half)
            store(f32, head, i, rounded(tag, first))
            store(f32, head, i + half, rounded(tag, second))


@_inner
def _remember(tag: Any, size: int, heads: int, num_heads: int, length: int, cache: int, capacity: int,
              place: int) -> None:  # fmt: skip
    """Heads [num_heads, length] written to a cache [num_heads, capacity, length] at a place."""
    for h in range(num_heads):
        to = cache + (h * capacity + place) * length * size
        for i in range(length):
            store(tag, to, i, load(np.float32(0), heads + 4 * h * length, i))


@_inner
def _weigh(scores: int, count: int, scale: float) -> Any:
    """Scores to exp(scale (score - largest)); returns their sum."""
    f32 = np.float32(0)
    largest = load(f32, scores, 0)
    for t in range(1, count):
        largest = max(largest, load(f32, scores, t))
    for t in range(count):
        store(f32, scores, t, _exp(scale * (load(f32, scores, t) - largest)))
    total = f32
    for t in range(count):
        total += load(f32, scores, t)
    return total


@_inner
def _attend(
    tag: Any, size: int, queries: int, keys: int, values: int, capacity: int, begin: int, end: int,
    scale: float, groups: int, num_keys: int, length: int, scores: int, out: int, room: int,
) -> None:  # fmt: skip
    """One token's queries [num_keys * groups, length] over the keys [begin, end) of its session."""
    f32, count = np.float32(0), end - begin
    asking = ready(tag, queries, num_keys * groups * length, room)
    for k in range(num_keys):
        first = (k * capacity + begin) * length * size
        mine = 4 * k * groups * length
        product(
            tag, f32, f32, size, keys + first, 0, asking + k * groups * length * row_bytes(tag), scores,
            0, count, count, length, groups,
        )  # fmt: skip
        for g in range(groups):
            weights, to = scores + 4 * g * count, out + mine + 4 * g * length
            total = _weigh(weights, count, scale)
            i = 0
            while i + 64 <= length:
                weighted_4(tag, values + first + i * size, length, weights, count, to + 4 * i)
                i += 64
            while i + 16 <= length:
                weighted_1(tag, values + first + i * size, length, weights, count, to + 4 * i)
                i += 16
            while i < length:
                weighed = f32
                for t in range(count):
                    weighed += load(f32, weights, t) * load(tag, values + first, t * length + i)
                store(f32, to, i, weighed)
                i += 1
            for i in range(length):
                store(f32, to, i, rounded(tag, load(f32, to, i) / total))


@_inner
def _see(
    tag: Any, size: int, model: Any, floats: Any, rows: Any, row: int, layer: int, heads: int, angles: int,
    scores: int, out: int, room: int,
) -> None:  # fmt: skip
    """What one row [queries, keys, values] of a layer sees of its session, once it is part of it."""
    num_queries, num_keys, length, at = model[3], model[4], model[5], MODEL_FIELDS + layer * LAYER_FIELDS
    new_keys = heads + 4 * num_queries * length
    new_values = new_keys + 4 * num_keys * length
    if model[at + 10] != 0:
        _normed(tag, heads, model[at + 10], floats[1], heads, num_queries, length)
        _normed(tag, new_keys, model[at + 11], floats[1], new_keys, num_keys, length)
    _rotate(tag, size, heads, num_queries + num_keys, length, angles + rows[row + 1] * 2 * length * size)
    place, capacity, keys = rows[row + 2], rows[row + 3], rows[row + ROW_FIELDS + 2 * layer]
    values = rows[row + ROW_FIELDS + 2 * layer + 1]
    _remember(tag, size, new_keys, num_keys, length, keys, capacity, place)
    _remember(tag, size, new_values, num_keys, length, values, capacity, place)
    begin = 0 if model[at + 12] == 0 else max(0, place + 1 - model[at + 12])
    _attend(
        tag, size, heads, keys, values, capacity, begin, place + 1, floats[2 + layer],
        num_queries // num_keys, num_keys, length, scores, out, room,
    )  # fmt: skip


@_inner
def _step(tag: Any, size: int, model: Any, floats: Any, rows: Any, angles: int, out: int, n: int) -> None:
    f32 = np.float32(0)
    num_layers, hidden, inner, num_queries, num_keys, length = (
        model[0], model[1], model[2], model[3], model[4], model[5]
    )  # fmt: skip
    groups, width, seen = num_queries // num_keys, (num_queries + 2 * num_keys) * length, num_queries * length
    fields = ROW_FIELDS + 2 * num_layers
    longest = 0
    for r in range(n):
        longest = max(longest, rows[r * fields + 2] + 1)
    most = max(hidden, seen, inner)
    room = np.empty(n * (2 * hidden + width + seen + 3 * inner + most) + groups * longest + 1, np.float32)
    x = room.ctypes.data
    normal = x + 4 * n * hidden
    heads = normal + 4 * n * hidden
    attended = heads + 4 * n * width
    gates = attended + 4 * n * seen
    active = gates + 8 * n * inner
    packed = active + 4 * n * inner
    scores = packed + 4 * n * most
    for r in range(n):
        for i in range(hidden):
            store(f32, x, r * hidden + i, load(tag, model[6], rows[r * fields] * hidden + i))
    for layer in range(num_layers):
        at = MODEL_FIELDS + layer * LAYER_FIELDS
        _normed(tag, x, model[at + 8], floats[0], normal, n, hidden)
        given = ready(tag, normal, n * hidden, packed)
        product(
            tag, tag, f32, size, model[at], model[at + 1], given, heads, 0, width, width, hidden, n
        )  # fmt: skip
        for r in range(n):
            _see(
                tag, size, model, floats, rows, r * fields, layer, heads + 4 * r * width, angles,
                scores, attended + 4 * r * seen, packed,
            )  # fmt: skip
        given = ready(tag, attended, n * seen, packed)
        product(
            tag, tag, f32, size, model[at + 2], model[at + 3], given, normal, 0, hidden, hidden, seen, n
        )  # fmt: skip
        _add(tag, x, normal, n * hidden)
        _normed(tag, x, model[at + 9], floats[0], normal, n, hidden)
        given = ready(tag, normal, n * hidden, packed)
        product(
            tag, tag, f32, size, model[at + 4], model[at + 5], given, gates, 0, 2 * inner, 2 * inner, hidden, n
        )  # fmt: skip
        _activate(tag, gates, active, n, inner)
        given = ready(tag, active, n * inner, packed)
        product(
            tag, tag, f32, size, model[at + 6], model[at + 7], given, normal, 0, hidden, hidden, inner, n
        )  # fmt: skip
        _add(tag, x, normal, n * hidden)
    _normed(tag, x, model[7], floats[0], normal, n, hidden)
    for i in range(n * hidden):
        store(tag, out, i, load(f32, normal, i))
    room[0] = 0.0  # numba frees an array after its last use, and an address is none


@_outer
def step_bfloat16(model: Any, floats: Any, rows: Any, angles: int, out: int, num_rows: int) -> None:
    """Final hidden states [num_rows, hidden]; the tables are those of `row_step`."""
    _step(np.uint16(0), 2, model, floats, rows, angles, out, num_rows)


@_outer
def step_float16(model: Any, floats: Any, rows: Any, angles: int, out: int, num_rows: int) -> None:
    """As `step_bfloat16`."""
    _step(np.int16(0), 2, model, floats, rows, angles, out, num_rows)


@_outer
def step_float32(model: Any, floats: Any, rows: Any, angles: int, out: int, num_rows: int) -> None:
    """As `step_bfloat16`."""
    _step(np.float32(0), 4, model, floats, rows, angles, out, num_rows)


STEP_SIGNATURE = "void(int64[::1],float32[::1],int64[::1],int64,int64,int64)"
