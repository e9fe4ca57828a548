"""RMS normalisation of rows with few operations: at small sizes it is the calls that cost."""

from __future__ import annotations

import math

import torch
from torch import Tensor


class RowNorm:
    """x / sqrt(mean(x^2) + eps) * weight, computed in float32 and rounded once.

    Args:
        weight: [H]; copied.
        eps: added to the mean square.

    Attributes:
        scale, floor_squared: x / sqrt(sum(x^2) + floor_squared) * scale.
    """

    def __init__(self, weight: Tensor, eps: float) -> None:
        size = weight.shape[0]
        # sqrt(mean + eps) = hypot(length, sqrt(eps H)) / sqrt(H); the divisor goes into the weight.
        self.scale = weight.detach().float() * math.sqrt(size)
        self.floor_squared = eps * size
        self._floor = torch.tensor(math.sqrt(self.floor_squared), device=weight.device)

    def __call__(self, x: Tensor, exact: bool = False) -> Tensor:
        """Rows [..., H] normalised, in the number format of x; exact = the same bits at any place among any rows.

        Sums go row by row in either case. hypot is one call instead of three, but rounds differently where it is
        vectorised and where not; the three are correctly rounded anywhere.
        """
        length: Tensor = torch.linalg.vector_norm(x, 2, -1, True, dtype=torch.float32)
        floored = (
            length.square_().add_(self.floor_squared).sqrt_() if exact else torch.hypot(length, self._floor)
        )
        normal: Tensor = (x / floored).mul_(self.scale)
        return normal if x.dtype is torch.float32 else normal.to(x.dtype)
