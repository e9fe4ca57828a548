"""Packing short rows side by side, so that a batch is mostly tokens instead of mostly padding.

three rows, padded         the same rows, packed: a token sees only its own row
b o x : 9 = 9              b o x : 9 = 9
4 + 3 = . . .              4 + 3 = 5 * 3
5 * 3 . . . .
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Packing:
    """Where every cell of a packed batch comes from.

    Attributes:
        rows: ``[R, W]`` index of the source row; 0 in padding.
        positions: ``[R, W]`` position within the source row; 0 in padding.
        real: ``[R, W]`` bool, False in padding.
    """

    rows: Tensor
    positions: Tensor
    real: Tensor

    def take(self, values: Tensor) -> Tensor:
        """Packs values ``[N, L]`` of the source rows' positions to ``[R, W]``; padding holds anything."""
        return values[self.rows, self.positions]

    def attention_mask(self) -> Tensor:
        """``[R, 1, W, W]`` bool: a cell sees its own row up to itself; padding sees only padding."""
        owner = torch.where(self.real, self.rows, torch.full_like(self.rows, -1))
        width = owner.shape[1]
        same = owner[:, :, None] == owner[:, None, :]
        return (same & torch.ones(width, width, dtype=torch.bool).tril())[:, None]


def pack(rows: NDArray[np.int64], lengths: NDArray[np.int64]) -> Packing:
    """Pack source rows, longest first, each into the first packed row with room.

    Args:
        rows: ``[B]`` indices of the source rows.
        lengths: ``[B]`` how many positions of each to take, from its start; at least one.
    """
    width = int(lengths.max())
    room: list[int] = []
    packed, columns = np.empty_like(rows), np.empty_like(rows)
    for index in np.argsort(-lengths, kind="stable"):
        length = int(lengths[index])
        place = next((place for place, free in enumerate(room) if free >= length), len(room))
        if place == len(room):
            room.append(width)
        packed[index], columns[index] = place, width - room[place]
        room[place] -= length
    within = np.concatenate([np.arange(length) for length in lengths])
    cells = (np.repeat(packed, lengths), np.repeat(columns, lengths) + within)
    shape = (len(room), width)
    source, positions, real = np.zeros(shape, np.int64), np.zeros(shape, np.int64), np.zeros(shape, np.bool_)
    source[cells], positions[cells], real[cells] = np.repeat(rows, lengths), within, True
    return Packing(torch.from_numpy(source), torch.from_numpy(positions), torch.from_numpy(real))
