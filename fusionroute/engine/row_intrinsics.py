"""What numba's language lacks for products of 16-bit numbers: loads, stores and scalar products in a fixed order.

Only imported where numba is there. The number format of weights is told by the type of a `tag` that is compiled away:
`np.uint16` = bfloat16, `np.int16` = float16, `np.float32` = float32. Addresses are bytes, indices count numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

BFLOAT16, FLOAT16, FLOAT32 = types.uint16, types.int16, types.float32

_LANES = 16
_CHAINS = 4
"""Sums that run beside each other, to hide how long one addition takes."""

_FLOAT, _I64, _I32, _I16, _HALF = (
    ir.FloatType(),
    ir.IntType(64),
    ir.IntType(32),
    ir.IntType(16),
    ir.HalfType(),
)
_FLOATS = ir.VectorType(_FLOAT, _LANES)
_STORED = {BFLOAT16: _I16, FLOAT16: _HALF, FLOAT32: _FLOAT}
_BYTES = {BFLOAT16: 2, FLOAT16: 2, FLOAT32: 4}


def _number(value: int) -> Any:
    return ir.Constant(_I64, value)


def _place(b: Any, tag: Any, address: Any, index: Any) -> Any:
    return b.gep(b.inttoptr(address, _STORED[tag].as_pointer()), [index])


def _loaded(b: Any, tag: Any, address: Any, index: Any) -> Any:
    """One number as a float."""
    stored = b.load(_place(b, tag, address, index), align=_BYTES[tag])
    if tag == BFLOAT16:
        return b.bitcast(b.shl(b.zext(stored, _I32), ir.Constant(_I32, 16)), _FLOAT)
    return b.fpext(stored, _FLOAT) if tag == FLOAT16 else stored


def _loaded_lanes(b: Any, tag: Any, address: Any, index: Any) -> Any:
    """`_LANES` numbers as floats."""
    place = b.bitcast(_place(b, tag, address, index), ir.VectorType(_STORED[tag], _LANES).as_pointer())
    stored = b.load(place, align=_BYTES[tag])
    if tag == BFLOAT16:
        integers = ir.VectorType(_I32, _LANES)
        shift = ir.Constant(integers, [16] * _LANES)
        return b.bitcast(b.shl(b.zext(stored, integers), shift), _FLOATS)
    return b.fpext(stored, _FLOATS) if tag == FLOAT16 else stored


def _fused_multiply_add(b: Any, kind: Any) -> Any:
    suffix = "f32" if kind is _FLOAT else f"v{_LANES}f32"
    return cgutils.get_or_insert_function(
        b.module, ir.FunctionType(kind, [kind, kind, kind]), f"llvm.fma.{suffix}"
    )


def _bfloat16_bits(b: Any, value: Any) -> Any:
    """Rounded to the nearest, ties to even; NaN stays NaN. In the lower half of an i32."""
    bits = b.bitcast(value, _I32)
    odd = b.and_(b.lshr(bits, ir.Constant(_I32, 16)), ir.Constant(_I32, 1))
    rounded = b.lshr(b.add(bits, b.add(odd, ir.Constant(_I32, 0x7FFF))), ir.Constant(_I32, 16))
    return b.select(b.fcmp_unordered("uno", value, value), ir.Constant(_I32, 0x7FC0), rounded)


def _sum_of_lanes(b: Any, lanes: Any) -> Any:
    count = _LANES // 2
    while count:
        kind = ir.VectorType(_I32, count)
        nothing = ir.Constant(lanes.type, ir.Undefined)
        lower = b.shuffle_vector(lanes, nothing, ir.Constant(kind, list(range(count))))
        upper = b.shuffle_vector(lanes, nothing, ir.Constant(kind, list(range(count, 2 * count))))
        lanes = b.fadd(lower, upper)
        count //= 2
    return b.extract_element(lanes, ir.Constant(_I32, 0))


def _loop(
    b: Any, start: Any, stop: Any, step: int, begun: list[Any], body: Callable[..., list[Any]]
) -> list[Any]:
    """for index in range(start, stop, step): sums = body(index, sums), which starts as `begun`; returns the sums."""
    before = b.block
    inside, after = b.append_basic_block("loop"), b.append_basic_block("after")
    b.cbranch(b.icmp_signed("<", start, stop), inside, after)
    b.position_at_end(inside)
    index = b.phi(_I64)
    sums = [b.phi(each.type) for each in begun]
    new = body(index, sums)
    following = b.add(index, _number(step))
    last = b.block
    b.cbranch(b.icmp_signed("<", following, stop), inside, after)
    index.add_incoming(start, before)
    index.add_incoming(following, last)
    b.position_at_end(after)
    ends = []
    for phi, first, later in zip(sums, begun, new, strict=True):
        phi.add_incoming(first, before)
        phi.add_incoming(later, last)
        end = b.phi(first.type)
        end.add_incoming(first, before)
        end.add_incoming(later, last)
        ends.append(end)
    return ends


def _dots(count: int) -> Any:
    """Scalar products of one row of weights with `count` rows of floats that lie `stride` numbers apart.

    Each is summed in an order that depends on `length` alone, whatever is computed beside it and on any machine that
    has a fused multiply-add.
    """

    def generate(context: Any, b: Any, signature: Any, arguments: Any) -> Any:
        tag = signature.args[0]
        _, weights, rows, stride, length = arguments
        places = [b.add(rows, b.mul(_number(4 * row), stride)) for row in range(count)]
        wide, single = _fused_multiply_add(b, _FLOATS), _fused_multiply_add(b, _FLOAT)

        def chains(num_chains: int) -> Callable[..., list[Any]]:
            def body(index: Any, sums: list[Any]) -> list[Any]:
                new = []
                for chain in range(num_chains):
                    at = b.add(index, _number(_LANES * chain))
                    weight = _loaded_lanes(b, tag, weights, at)
                    for row, place in enumerate(places):
                        lanes = _loaded_lanes(b, FLOAT32, place, at)
                        new.append(b.call(wide, [weight, lanes, sums[chain * count + row]]))
                return new

            return body

        def rest(index: Any, sums: list[Any]) -> list[Any]:
            weight = _loaded(b, tag, weights, index)
            return [
                b.call(single, [weight, _loaded(b, FLOAT32, place, index), sums[row]])
                for row, place in enumerate(places)
            ]

        in_chains = b.sub(length, b.srem(length, _number(_LANES * _CHAINS)))
        in_lanes = b.sub(length, b.srem(length, _number(_LANES)))
        zero = ir.Constant(_FLOATS, [0.0] * _LANES)
        sums = _loop(b, _number(0), in_chains, _LANES * _CHAINS, [zero] * (_CHAINS * count), chains(_CHAINS))
        joined = [
            b.fadd(b.fadd(sums[row], sums[count + row]), b.fadd(sums[2 * count + row], sums[3 * count + row]))
            for row in range(count)
        ]
        joined = _loop(b, in_chains, in_lanes, _LANES, joined, chains(1))
        totals = _loop(b, in_lanes, length, 1, [_sum_of_lanes(b, each) for each in joined], rest)
        return context.make_tuple(b, signature.return_type, totals)

    @intrinsic
    def dots(typing: Any, tag: Any, weights: Any, rows: Any, stride: Any, length: Any) -> Any:
        return types.UniTuple(types.float32, count)(tag, weights, rows, stride, length), generate

    return dots


dot_1, dot_2, dot_4 = _dots(1), _dots(2), _dots(4)


@intrinsic
def load(typing: Any, tag: Any, address: Any, index: Any) -> Any:
    """The number at an index as float32."""

    def generate(context: Any, b: Any, signature: Any, arguments: Any) -> Any:
        return _loaded(b, signature.args[0], arguments[1], arguments[2])

    return types.float32(tag, address, index), generate


@intrinsic
def store(typing: Any, tag: Any, address: Any, index: Any, value: Any) -> Any:
    """Writes a float32 in the tag's format, rounded to the nearest, ties to even."""

    def generate(context: Any, b: Any, signature: Any, arguments: Any) -> Any:
        kind = signature.args[0]
        _, where, index, value = arguments
        if kind == BFLOAT16:
            value = b.trunc(_bfloat16_bits(b, value), _I16)
        elif kind == FLOAT16:
            value = b.fptrunc(value, _HALF)
        b.store(value, _place(b, kind, where, index), align=_BYTES[kind])
        return context.get_dummy_value()

    return types.void(tag, address, index, types.float32), generate


@intrinsic
def rounded(typing: Any, tag: Any, value: Any) -> Any:
    """A float32 as what the tag's format would make of it."""

    def generate(context: Any, b: Any, signature: Any, arguments: Any) -> Any:
        value = arguments[1]
        if signature.args[0] == BFLOAT16:
            return b.bitcast(b.shl(_bfloat16_bits(b, value), ir.Constant(_I32, 16)), _FLOAT)
        if signature.args[0] == FLOAT16:
            return b.fpext(b.fptrunc(value, _HALF), _FLOAT)
        return value

    return types.float32(tag, types.float32), generate


@intrinsic
def power_of_two(typing: Any, exponent: Any) -> Any:
    """2 ** exponent, an int32 from -126 to 127."""

    def generate(context: Any, b: Any, signature: Any, arguments: Any) -> Any:
        biased = b.add(arguments[0], ir.Constant(_I32, 127))
        return b.bitcast(b.shl(biased, ir.Constant(_I32, 23)), _FLOAT)

    return types.float32(types.int32), generate
