"""Scalar products in tiles: some rows of weights with some rows, all sums in registers; beside `row_intrinsics`.

    tile 4 x 4:   sums [4 outputs, 4 rows] += weights [4, lanes] * rows [4, lanes],  for lanes over the length

Weights are read from memory once for all the rows that a tile takes, and from the nearest cache for those of further
tiles. Where the processor multiplies pairs of bfloat16 numbers and adds them to a float32 (AVX-512 BF16), bfloat16
weights are taken so: no conversion, and twice the numbers an instruction.
"""

from __future__ import annotations

from typing import Any

from llvmlite import binding, ir
from numba import types
from numba.core import cgutils, config
from numba.extending import intrinsic

from fusionroute.engine.row_intrinsics import (
    BFLOAT16,
    BYTES,
    FLOAT,
    FLOAT32,
    FLOATS,
    I32,
    LANES,
    as_kept,
    as_stored,
    filled,
    fused_multiply_add,
    lanes_of,
    loaded,
    loaded_lanes,
    loop,
    number,
    place,
    sums_of_lanes,
)

HAS_PAIRS = (
    bool(binding.get_host_cpu_features().get("avx512bf16")) and not config.CPU_NAME and not config.CPU_FEATURES
)
"""Whether the processor multiplies pairs of bfloat16 numbers, and numba compiles for no other one."""

_CHAINS = 4
"""Sums of `dot` that run beside each other, to hide how long one addition takes."""
_AHEAD = 16
"""Rows of weights between what is read and what is asked of memory to be read later."""
_SECOND_CACHE = 2
"""Where it is to come. The first cache, nearer, allows too few requests at a time to keep memory busy."""


class _BFloat(ir.Type):  # type: ignore[misc]
    """LLVM's own bfloat16, which its intrinsics want and llvmlite lacks."""

    def _to_string(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _BFloat)

    def __hash__(self) -> int:
        return hash(_BFloat)


_PAIRS = ir.VectorType(_BFloat(), 2 * LANES)


def row_format(tag: Any) -> Any:
    """The format of rows that such weights are multiplied with."""
    return BFLOAT16 if tag == BFLOAT16 and HAS_PAIRS else FLOAT32


@intrinsic
def row_bytes(typing: Any, tag: Any) -> Any:
    """Bytes of a number in rows that such weights are multiplied with: 2 if those are bfloat16, 4 if float32."""

    def generate(context: Any, b: Any, signature: Any, arguments: Any) -> Any:
        return number(BYTES[row_format(signature.args[0])])

    return types.int64(tag), generate


def _pairs(b: Any, address: Any, index: Any) -> Any:
    kind = ir.VectorType(I32, LANES)
    where = b.bitcast(place(b, BFLOAT16, address, index), kind.as_pointer())
    return b.bitcast(b.load(where, align=2), _PAIRS)


def _add_pairs(b: Any, sums: Any, first: Any, second: Any) -> Any:
    function = ir.FunctionType(FLOATS, [FLOATS, _PAIRS, _PAIRS])
    name = "llvm.x86.avx512bf16.dpbf16ps.512"
    return b.call(cgutils.get_or_insert_function(b.module, function, name), [sums, first, second])


def _prefetch(b: Any, address: Any) -> None:
    pointer = ir.IntType(8).as_pointer()
    function = ir.FunctionType(ir.VoidType(), [pointer, I32, I32, I32])
    options = [ir.Constant(I32, each) for each in (0, _SECOND_CACHE, 1)]  # to read; data
    prefetch = cgutils.get_or_insert_function(b.module, function, "llvm.prefetch.p0")
    b.call(prefetch, [b.inttoptr(address, pointer), *options])


def _sums(b: Any, tag: Any, weights: list[Any], rows: list[Any], length: Any, ahead: Any) -> Any:
    """Vector of the products of each row with each row of weights, [rows, weights], from their addresses.

    Each is summed in an order that depends on `length` alone, whatever is computed beside it.

    Args:
        ahead: bytes from the weights to those that are to be fetched meanwhile; None = none.
    """
    is_paired = row_format(tag) == BFLOAT16
    step = 2 * LANES if is_paired else LANES

    def body(index: Any, sums: list[Any]) -> list[Any]:
        if ahead is not None:
            later = b.add(ahead, b.mul(index, number(BYTES[tag])))
            for each in weights:
                _prefetch(b, b.add(each, later))
        if is_paired:
            read = [_pairs(b, each, index) for each in weights]
            new = (_pairs(b, each, index) for each in rows)
            products = ((each, weight) for each in new for weight in read)
            return [_add_pairs(b, sum_, *pair) for sum_, pair in zip(sums, products, strict=True)]
        read = [loaded_lanes(b, tag, each, index) for each in weights]
        new = (loaded_lanes(b, FLOAT32, each, index) for each in rows)
        products = ((each, weight) for each in new for weight in read)
        return [fused_multiply_add(b, *pair, sum_) for sum_, pair in zip(sums, products, strict=True)]

    def rest(index: Any, totals: list[Any]) -> list[Any]:
        first = _repeated(b, [loaded(b, row_format(tag), each, index) for each in rows], len(weights), True)
        second = _repeated(b, [loaded(b, tag, each, index) for each in weights], len(rows), False)
        return [fused_multiply_add(b, first, second, totals[0])]

    whole = b.sub(length, b.srem(length, number(step)))
    sums = loop(b, number(0), whole, step, [filled(FLOATS, 0.0)] * (len(weights) * len(rows)), body)
    return loop(b, whole, length, 1, [sums_of_lanes(b, sums)], rest)[0]


def _repeated(b: Any, numbers: list[Any], times: int, is_each: bool) -> Any:
    """A vector of floats: each number so many times, or all of them so many times."""
    vector = ir.Constant(ir.VectorType(FLOAT, len(numbers)), ir.Undefined)
    for index, each in enumerate(numbers):
        vector = b.insert_element(vector, each, ir.Constant(I32, index))
    count = len(numbers)
    lanes = [lane // times if is_each else lane % count for lane in range(count * times)]
    return lanes_of(b, vector, vector, lanes)


def _tile(num_weights: int, num_rows: int, reads_ahead: bool = False) -> Any:
    """Products of so many rows with so many rows of weights, plus bias, rounded to a format and stored as another.

    Args:
        reads_ahead: fetch further weights meanwhile; for the first tile of a block of weights.
    """

    def generate(context: Any, b: Any, signature: Any, arguments: Any) -> Any:
        tag, kept, out_tag = signature.args[:3]
        weights, bias, rows, out, stride, length = arguments[3:]
        weight_bytes, bytes_of_row = number(BYTES[tag]), number(BYTES[row_format(tag)])
        first = [b.add(weights, b.mul(b.mul(number(i), length), weight_bytes)) for i in range(num_weights)]
        second = [b.add(rows, b.mul(b.mul(number(i), length), bytes_of_row)) for i in range(num_rows)]
        ahead = b.mul(b.mul(number(_AHEAD), length), weight_bytes) if reads_ahead else None
        sums = _sums(b, tag, first, second, length, ahead)
        has_bias = b.icmp_signed("!=", bias, number(0))
        where = b.select(has_bias, bias, weights)  # what is read there counts only if there is a bias
        kind = ir.VectorType(FLOAT, num_weights)
        added = b.select(has_bias, loaded_lanes(b, tag, where, number(0), num_weights), filled(kind, 0.0))
        added = lanes_of(b, added, added, list(range(num_weights)) * num_rows)
        results = as_stored(b, out_tag, as_kept(b, kept, b.fadd(sums, added)))
        for row in range(num_rows):
            mine = lanes_of(b, results, results, [row * num_weights + i for i in range(num_weights)])
            to = place(b, out_tag, out, b.mul(number(row), stride))
            b.store(mine, b.bitcast(to, mine.type.as_pointer()), align=BYTES[out_tag])
        return context.get_dummy_value()

    @intrinsic
    def tile(
        typing: Any, tag: Any, kept: Any, out_tag: Any, weights: Any, bias: Any, rows: Any, out: Any, stride: Any,
        length: Any,
    ) -> Any:  # fmt: skip
        return types.void(tag, kept, out_tag, weights, bias, rows, out, stride, length), generate

    return tile


tile_4_4, tile_4_2, tile_4_1, tile_1_1 = _tile(4, 4), _tile(4, 2), _tile(4, 1), _tile(1, 1)
first_16_1, first_8_2, first_4_4 = _tile(16, 1, True), _tile(8, 2, True), _tile(4, 4, True)
first_4_2, first_4_1 = _tile(4, 2, True), _tile(4, 1, True)
"""`first_W_R` and `tile_W_R`: W rows of weights, R rows; the former fetch further weights meanwhile.

(tag, kept, out tag; addresses of the first weight, its bias or 0, the first row, its output; stride of out, length)
"""


def _weighted(num_blocks: int) -> Any:
    """Weighted sum of rows' parts of `LANES * num_blocks` numbers, as float32."""

    def generate(context: Any, b: Any, signature: Any, arguments: Any) -> Any:
        tag = signature.args[0]
        _, rows, stride, weights, count, out = arguments

        def chains(num_chains: int) -> Any:
            def body(index: Any, sums: list[Any]) -> list[Any]:
                new = []
                for chain in range(num_chains):
                    at = b.add(index, number(chain))
                    weight = _repeated(b, [loaded(b, FLOAT32, weights, at)], LANES, True)
                    for block in range(num_blocks):
                        part = b.add(b.mul(at, stride), number(LANES * block))
                        lanes = loaded_lanes(b, tag, rows, part)
                        new.append(fused_multiply_add(b, weight, lanes, sums[chain * num_blocks + block]))
                return new

            return body

        pairs = b.sub(count, b.srem(count, number(2)))
        zeros = [filled(FLOATS, 0.0)] * (2 * num_blocks)
        sums = loop(b, number(0), pairs, 2, zeros, chains(2))
        joined = [b.fadd(sums[block], sums[num_blocks + block]) for block in range(num_blocks)]
        joined = loop(b, pairs, count, 1, joined, chains(1))
        for block, total in enumerate(joined):
            to = place(b, FLOAT32, out, number(LANES * block))
            b.store(total, b.bitcast(to, FLOATS.as_pointer()), align=BYTES[FLOAT32])
        return context.get_dummy_value()

    @intrinsic
    def weighted(typing: Any, tag: Any, rows: Any, stride: Any, weights: Any, count: Any, out: Any) -> Any:
        return types.void(tag, rows, stride, weights, count, out), generate

    return weighted


weighted_4, weighted_1 = _weighted(4), _weighted(1)
"""(tag, address of the first row's part, numbers from row to row, weights, number of rows, out)."""


@intrinsic
def dot(typing: Any, first: Any, second: Any, length: Any) -> Any:
    """The scalar product of two rows of float32."""

    def generate(context: Any, b: Any, signature: Any, arguments: Any) -> Any:
        first, second, length = arguments

        def chains(count: int) -> Any:
            def body(index: Any, sums: list[Any]) -> list[Any]:
                at = [b.add(index, number(LANES * chain)) for chain in range(count)]
                return [
                    fused_multiply_add(
                        b, loaded_lanes(b, FLOAT32, first, i), loaded_lanes(b, FLOAT32, second, i), total
                    )
                    for i, total in zip(at, sums, strict=True)
                ]

            return body

        def rest(index: Any, totals: list[Any]) -> list[Any]:
            factors = loaded(b, FLOAT32, first, index), loaded(b, FLOAT32, second, index)
            return [fused_multiply_add(b, *factors, totals[0])]

        in_chains = b.sub(length, b.srem(length, number(LANES * _CHAINS)))
        in_lanes = b.sub(length, b.srem(length, number(LANES)))
        zeros = [filled(FLOATS, 0.0)] * _CHAINS
        sums = loop(b, number(0), in_chains, LANES * _CHAINS, zeros, chains(_CHAINS))
        joined = b.fadd(b.fadd(sums[0], sums[1]), b.fadd(sums[2], sums[3]))
        joined = loop(b, in_chains, in_lanes, LANES, [joined], chains(1))[0]
        total = b.extract_element(sums_of_lanes(b, [joined]), ir.Constant(I32, 0))
        return loop(b, in_lanes, length, 1, [total], rest)[0]

    return types.float32(first, second, length), generate
