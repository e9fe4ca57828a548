"""Matrix products whose rows have the same bits whatever other rows they are computed with.

A library sums a row's products in an order that depends on the shapes, not on the numbers: one row goes another way
than four, while four, eight and sixty-four often go the same. Which do is found by trying, once for each shape of
weights: random rows, each size of tile, every row at two places. Rows are then computed in tiles of those sizes only.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

Linear = Callable[[Tensor, Tensor, Tensor | None], Tensor]

TILE = 4
"""Rows come in multiples of this: fewer go other ways, and cost about the same."""
_SIZES = (256, 64, 16, 8, TILE)
_MOST_NUMBERS = 1 << 22
"""Larger results are not tried beyond `_FEW` rows: vocabularies, of which few rows are wanted."""
_FEW = 16
_ALIGNMENT_BYTES = 64


def padded(num_rows: int) -> int:
    """The next multiple of `TILE`."""
    return -(-num_rows // TILE) * TILE


class ExactTiles:
    """`linear` in tiles that agree. Made for one model; not for several threads.

    Args:
        product: what is called with one tile.
    """

    def __init__(self, product: Linear = functional.linear) -> None:
        self._product = product
        self._sizes: dict[tuple[torch.Size, bool], tuple[int, ...]] = {}

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """x [n, K] times weight [N, K] -> [n, N], n a multiple of `TILE`."""
        key = (weight.shape, bias is None)
        sizes = self._sizes.get(key)
        if sizes is None:
            sizes = self._sizes[key] = agreeing_sizes(weight, bias, self._product)
        return _in_tiles(x.contiguous(), weight, bias, sizes, self._product)


def agreeing_sizes(
    weight: Tensor, bias: Tensor | None, product: Linear = functional.linear
) -> tuple[int, ...]:
    """Sizes of tiles, falling, that give the same bits as tiles of the last one; (1,) if not even `TILE` does."""
    sizes = [size for size in _SIZES if size <= _FEW or size * weight.shape[0] <= _MOST_NUMBERS]
    source = torch.Generator().manual_seed(0)
    rows = torch.randn((sizes[0], weight.shape[1]), generator=source).to(weight)
    wanted = _in_tiles(rows, weight, bias, (TILE,), product)

    def agrees(size: int) -> bool:
        """Whether rows in reverse order, and therefore at other places within their tiles, come out the same."""
        return torch.equal(
            _in_tiles(rows[:size].flip(0), weight, bias, (size,), product).flip(0), wanted[:size]
        )

    if not agrees(TILE):
        return (1,)
    return tuple(size for size in sizes if agrees(size))


def _in_tiles(
    x: Tensor, weight: Tensor, bias: Tensor | None, sizes: tuple[int, ...], product: Linear
) -> Tensor:
    if x.shape[0] in sizes:
        return product(x, weight, bias)
    parts: list[Tensor] = []
    start = 0
    while start < x.shape[0]:
        size = next(size for size in sizes if size <= x.shape[0] - start)
        tile = x[start : start + size]
        # Products of rows that lie askew in memory may go another way.
        parts.append(product(tile if tile.data_ptr() % _ALIGNMENT_BYTES == 0 else tile.clone(), weight, bias))
        start += size
    return torch.cat(parts) if parts else x.new_empty((0, weight.shape[0]))
