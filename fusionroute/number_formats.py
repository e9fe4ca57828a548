"""Rows of logits from one number format to another, and whether they are numbers at all, without torch's threads.

Torch divides what touches a row of 128k numbers among its threads, and those go on spinning for milliseconds: longer
than all of it takes here, and on processors that the next forward wants. Only float16 is left to it, which numpy
converts several times slower.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_INFINITY = {torch.float32: 0x7F800000, torch.bfloat16: 0x7F80, torch.float16: 0x7C00}
"""As a whole number of the format's size. What is not finite is no smaller, but for the bit of the sign."""


def as_float32(rows: Tensor) -> NDArray[np.float32]:
    """Numbers of any format as float32, in the same shape; of float32 the same memory."""
    if rows.dtype is torch.bfloat16:
        return widened(_halves(rows))
    floats: NDArray[np.float32] = rows.float().numpy()
    return floats


def write_float32(rows: Tensor, out: NDArray[np.float32]) -> None:
    """Writes numbers as float32 to an array of their shape."""
    if rows.dtype is torch.bfloat16:
        widened(_halves(rows), out)
    else:
        np.copyto(out, as_float32(rows))


def widened(halves: NDArray[np.uint16], out: NDArray[np.float32] | None = None) -> NDArray[np.float32]:
    """The bits of bfloat16 numbers as float32, of which each is the upper half."""
    wide = np.empty(halves.shape, np.float32) if out is None else out
    np.left_shift(halves, 16, out=wide.view(np.uint32), dtype=np.uint32)
    return wide


def are_finite(rows: Tensor) -> list[bool]:
    """Of each row [n, V] on the CPU: whether it holds neither infinities nor NaN."""
    if rows.dtype not in _INFINITY:
        return [bool(each) for each in rows.isfinite().all(dim=1)]
    infinity = _INFINITY[rows.dtype]
    signed, unsigned, sign = (
        (torch.int32, np.uint32, 1 << 31) if rows.itemsize == 4 else (torch.int16, np.uint16, 1 << 15)
    )
    bits = rows.view(signed).numpy()
    # As signed numbers the positive ones are largest, as unsigned ones the negative.
    positive = bits.max(axis=1, initial=0) < infinity
    negative = bits.view(unsigned).max(axis=1, initial=0) < infinity | sign
    return [bool(each) for each in positive & negative]


def _halves(rows: Tensor) -> NDArray[np.uint16]:
    halves: NDArray[np.uint16] = rows.view(torch.int16).numpy().view(np.uint16)
    return halves
