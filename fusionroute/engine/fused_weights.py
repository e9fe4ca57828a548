"""Several linear maps of the same input as one, without storing anything twice."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


def can_fuse(maps: Sequence[nn.Linear]) -> bool:
    """Whether either all of them have a bias or none."""
    return len({each.bias is None for each in maps}) == 1


def fuse(maps: Sequence[nn.Linear]) -> tuple[Tensor, Tensor | None]:
    """Weight [sum of outputs, inputs] and bias of the maps stacked; their own parameters become views of these.

    They keep their names, shapes and numbers, so that the module that owns them works as before. One map stays as it
    is. The maps must be as `can_fuse` says.
    """
    # Mostly outside of inference mode: the trainer differentiates through modules that were loaded for serving.
    with torch.inference_mode(maps[0].weight.is_inference()), torch.no_grad():
        weight = _stacked([each.weight for each in maps])
        biases: list[nn.Parameter | None] = [each.bias for each in maps]
        present = [bias for bias in biases if bias is not None]
        return weight, _stacked(present) if present else None


def _stacked(parameters: Sequence[Tensor]) -> Tensor:
    if len(parameters) == 1:
        return parameters[0].data
    stacked = torch.cat([parameter.data for parameter in parameters])
    start = 0
    for parameter in parameters:
        stop = start + parameter.shape[0]
        parameter.data = stacked[start:stop]
        start = stop
    return stacked
