"""What numba's language lacks for forwards of 16-bit numbers: loads, stores, roundings, and how LLVM is told of them.

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

LANES = 16
FLOAT, I64, I32, I16 = ir.FloatType(), ir.IntType(64), ir.IntType(32), ir.IntType(16)
FLOATS = ir.VectorType(FLOAT, LANES)
STORED = {BFLOAT16: I16, FLOAT16: ir.HalfType(), FLOAT32: FLOAT}
BYTES = {BFLOAT16: 2, FLOAT16: 2, FLOAT32: 4}


def number(value: int) -> Any:
    """A constant index."""
    return ir.Constant(I64, value)


def filled(kind: Any, value: float) -> Any:
    """A constant, or a vector that is it throughout."""
    return ir.Constant(kind, [value] * kind.count if isinstance(kind, ir.VectorType) else value)


def alike(shape: Any, element: Any) -> Any:
    """The type of such elements in as many lanes."""
    return ir.VectorType(element, shape.count) if isinstance(shape, ir.VectorType) else element


def place(b: Any, tag: Any, address: Any, index: Any) -> Any:
    """A pointer to the number at an index."""
    return b.gep(b.inttoptr(address, STORED[tag].as_pointer()), [index])


def as_floats(b: Any, tag: Any, stored: Any) -> Any:
    """A number, or each of a vector, as it is stored to a float."""
    if tag == BFLOAT16:
        kind = alike(stored.type, I32)
        return b.bitcast(b.shl(b.zext(stored, kind), filled(kind, 16)), alike(stored.type, FLOAT))
    return b.fpext(stored, alike(stored.type, FLOAT)) if tag == FLOAT16 else stored


def as_stored(b: Any, tag: Any, value: Any) -> Any:
    """A float, or each of a vector, as it is stored: rounded to the nearest, ties to even."""
    if tag == BFLOAT16:
        return b.trunc(_bfloat16_bits(b, value), alike(value.type, I16))
    return b.fptrunc(value, alike(value.type, STORED[tag])) if tag == FLOAT16 else value


def as_kept(b: Any, tag: Any, value: Any) -> Any:
    """A float, or each of a vector, as what the tag's format would make of it."""
    if tag == BFLOAT16:
        bits = _bfloat16_bits(b, value)
        return b.bitcast(b.shl(bits, filled(bits.type, 16)), value.type)
    return as_floats(b, tag, as_stored(b, tag, value))


def loaded(b: Any, tag: Any, address: Any, index: Any) -> Any:
    """One number as a float."""
    return as_floats(b, tag, b.load(place(b, tag, address, index), align=BYTES[tag]))


def loaded_lanes(b: Any, tag: Any, address: Any, index: Any, count: int = LANES) -> Any:
    """`count` numbers as floats."""
    kind = ir.VectorType(STORED[tag], count)
    where = b.bitcast(place(b, tag, address, index), kind.as_pointer())
    return as_floats(b, tag, b.load(where, align=BYTES[tag]))


def fused_multiply_add(b: Any, first: Any, second: Any, added: Any) -> Any:
    """first * second + added, rounded once."""
    kind = first.type
    suffix = f"v{kind.count}f32" if isinstance(kind, ir.VectorType) else "f32"
    function = ir.FunctionType(kind, [kind, kind, kind])
    return b.call(cgutils.get_or_insert_function(b.module, function, f"llvm.fma.{suffix}"), [first, second, added])


def lanes_of(b: Any, first: Any, second: Any, lanes: list[int]) -> Any:
    """These lanes of two vectors laid side by side."""
    return b.shuffle_vector(first, second, ir.Constant(ir.VectorType(I32, len(lanes)), lanes))


def sums_of_lanes(b: Any, vectors: list[Any]) -> Any:
    """The sum of each vector's lanes, as one vector of as many lanes as there are vectors: a power of two up to 16.

    Halves are added to halves, so that each sum's order is the same however many there are.
    """
    length = LANES
    while length > 1:
        half, width = length // 2, vectors[0].type.count
        lower = [lane for lane in range(2 * width) if lane % length < half]
        if len(vectors) == 1:
            vectors = [*vectors, vectors[0]]
            lower = lower[: width // 2]
        upper = [lane + half for lane in lower]
        pairs = zip(vectors[::2], vectors[1::2], strict=True)
        vectors = [b.fadd(lanes_of(b, *pair, lower), lanes_of(b, *pair, upper)) for pair in pairs]
        length = half
    return vectors[0]


def loop(
    b: Any, start: Any, stop: Any, step: int, begun: list[Any], body: Callable[..., list[Any]]
) -> list[Any]:
    """for index in range(start, stop, step): sums = body(index, sums), which starts as `begun`; returns the sums."""
    before = b.block
    inside, after = b.append_basic_block("loop"), b.append_basic_block("after")
    b.cbranch(b.icmp_signed("<", start, stop), inside, after)
    b.position_at_end(inside)
    index = b.phi(I64)
    sums = [b.phi(each.type) for each in begun]
    new = body(index, sums)
    following = b.add(index, number(step))
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


def _bfloat16_bits(b: Any, value: Any) -> Any:
    """A float, or each of a vector, rounded to the nearest, ties to even; NaN stays so. In the lower half of an i32."""
    kind = alike(value.type, I32)
    bits = b.bitcast(value, kind)
    odd = b.and_(b.lshr(bits, filled(kind, 16)), filled(kind, 1))
    rounded = b.lshr(b.add(bits, b.add(odd, filled(kind, 0x7FFF))), filled(kind, 16))
    return b.select(b.fcmp_unordered("uno", value, value), filled(kind, 0x7FC0), rounded)


@intrinsic
def bytes_of(typing: Any, tag: Any) -> Any:
    """Bytes of a number in the tag's format."""

    def generate(context: Any, b: Any, signature: Any, arguments: Any) -> Any:
        return number(BYTES[signature.args[0]])

    return types.int64(tag), generate


@intrinsic
def load(typing: Any, tag: Any, address: Any, index: Any) -> Any:
    """The number at an index as float32."""

    def generate(context: Any, b: Any, signature: Any, arguments: Any) -> Any:
        return loaded(b, signature.args[0], arguments[1], arguments[2])

    return types.float32(tag, address, index), generate


@intrinsic
def store(typing: Any, tag: Any, address: Any, index: Any, value: Any) -> Any:
    """Writes a float32 in the tag's format, rounded to the nearest, ties to even."""

    def generate(context: Any, b: Any, signature: Any, arguments: Any) -> Any:
        kind = signature.args[0]
        _, where, index, value = arguments
        b.store(as_stored(b, kind, value), place(b, kind, where, index), align=BYTES[kind])
        return context.get_dummy_value()

    return types.void(tag, address, index, types.float32), generate


@intrinsic
def rounded(typing: Any, tag: Any, value: Any) -> Any:
    """A float32 as what the tag's format would make of it."""

    def generate(context: Any, b: Any, signature: Any, arguments: Any) -> Any:
        return as_kept(b, signature.args[0], arguments[1])

    return types.float32(tag, types.float32), generate


@intrinsic
def power_of_two(typing: Any, exponent: Any) -> Any:
    """2 ** exponent, an int32 from -126 to 127."""

    def generate(context: Any, b: Any, signature: Any, arguments: Any) -> Any:
        biased = b.add(arguments[0], ir.Constant(I32, 127))
        return b.bitcast(b.shl(biased, ir.Constant(I32, 23)), FLOAT)

    return types.float32(types.int32), generate
