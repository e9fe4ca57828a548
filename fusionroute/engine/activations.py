"""Activations of the known families as plain functions."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, silu

Activation = Callable[[Tensor], Tensor]

_PLAIN: dict[str, Activation] = {
    "GELUTanh": partial(gelu, approximate="tanh"),
    "SiLU": silu,
    "SiLUActivation": silu,
}
"""By the names of transformers' and torch's modules; what they compute is checked at load."""

_UNDIVIDED_NUMBERS = 32767
"""Elementwise operations on more numbers are divided among threads, wherever that may cut a row."""


def activation_of(module: nn.Module) -> Activation:
    """[n, I] -> [n, I] in memory of its own; without the cost of a module's call where that is known to be plain."""
    return _PLAIN.get(type(module).__name__, module)


def by_rows(activation: Activation) -> Activation:
    """The same with the same bits for a row whatever other rows there are.

    exp and tanh round differently in the vectorised body of a loop and in its rest. Rows that lie apart in memory,
    too few to be divided among threads, are looped over one by one, so that each has the same body and rest.
    """

    def activate(x: Tensor) -> Tensor:
        num_rows = max(1, _UNDIVIDED_NUMBERS // x.shape[1])
        if x.shape[0] <= num_rows:
            return activation(x)
        return torch.cat([activation(x[at : at + num_rows]) for at in range(0, x.shape[0], num_rows)])

    return activate
