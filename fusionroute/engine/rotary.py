"""Rotary position embedding from a table: the angles of a position are computed once, always in the same shape."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

BLOCK_POSITIONS = 1024
"""Positions are tabulated in blocks, so that a position's numbers never depend on how far others have got."""


class RotaryTable:
    """Cosines and sines of positions, made by the model's own module as they are needed.

    Args:
        rotary: the model's rotary embedding: (x, position ids [1, n]) -> cos, sin [1, n, size].
        like: any tensor of the model's number format and device.
        num_positions: positions the model knows.

    Attributes:
        num_known: those.

    Raises:
        ValueError: the module does not rotate whole heads of `size`.
    """

    def __init__(self, rotary: nn.Module, like: Tensor, size: int, num_positions: int) -> None:
        self._rotary = rotary
        self._like = like.new_empty((1, 1, 1))
        self._block = min(BLOCK_POSITIONS, num_positions)
        self._half = size // 2
        self.num_known = num_positions
        self._num_positions = 0
        self._table = like.new_empty((0, 2, 1, size))
        self._room = self._table
        self._grow(1)
        if self._table.shape[-1] != size:
            raise ValueError(f"rotates {self._table.shape[-1]} of {size} numbers of a head")

    def at(self, positions: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Cosines and signed sines [n, 1, size] of positions."""
        table = self.table(max(positions) + 1)
        rows = table.index_select(0, torch.tensor(positions, device=table.device))
        return rows[:, 0], rows[:, 1]

    def table(self, num_positions: int) -> Tensor:
        """Cosines and signed sines [at least num_positions, 2, 1, size]."""
        if num_positions > self._num_positions:
            self._grow(num_positions)
        return self._table

    def rotate(self, heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Heads [n, h, size] turned to their positions."""
        return (heads * cos).add_(heads.roll(self._half, -1).mul_(sin))

    def _grow(self, num_positions: int) -> None:
        while self._num_positions < num_positions:
            block = self._tabulated(self._num_positions)
            start, stop = self._num_positions, self._num_positions + self._block
            if stop > self._room.shape[0]:
                room = block.new_empty((max(stop, 2 * start), *block.shape[1:]))
                room[:start] = self._table
                self._room = room
            self._room[start:stop] = block
            self._table, self._num_positions = self._room[:stop], stop

    def _tabulated(self, start: int) -> Tensor:
        device = self._like.device
        cos, sin = self._rotary(self._like, torch.arange(start, start + self._block, device=device)[None])
        signed = torch.cat((-sin[..., : self._half], sin[..., self._half :]), dim=-1)
        return torch.stack((cos[0], signed[0]), dim=1)[:, :, None]
