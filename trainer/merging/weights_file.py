"""Writing safetensors as a stream: the header says what will come, then one tensor after the other.

    8 bytes            length of the header, little-endian
    header             JSON: name -> dtype, shape, [first byte, last byte + 1]
    bytes of tensors   in the order of the header, without gaps

The library itself wants all tensors of a file in memory at once.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trainer.merging.folders import TensorPlace

_BITS = {
    "F64": 64,
    "F32": 32,
    "F16": 16,
    "BF16": 16,
    "I64": 64,
    "I32": 32,
    "I16": 16,
    "I8": 8,
    "U8": 8,
    "BOOL": 8,
}
_ALIGNMENT = 8


class WeightsWriter:
    """A file of tensors whose sizes are known before their numbers; a context manager.

    Args:
        path: of the new file.
        tensors: what will be written, in this order.

    Raises:
        ValueError: a tensor has a dtype that is not written here.
    """

    def __init__(self, path: Path, tensors: Mapping[str, TensorPlace]) -> None:
        self._expected, header = 0, {"__metadata__": {"format": "pt"}}
        entries: dict[str, object] = dict(header)
        for name, place in tensors.items():
            if place.dtype not in _BITS:
                raise ValueError(f"tensor {name} has dtype {place.dtype}, which cannot be merged")
            size = torch.Size(place.shape).numel() * _BITS[place.dtype] // 8
            offsets = [self._expected, self._expected + size]
            entries[name] = {"dtype": place.dtype, "shape": list(place.shape), "data_offsets": offsets}
            self._expected += size
        text = json.dumps(entries, separators=(",", ":")).encode()
        text += b" " * (-len(text) % _ALIGNMENT)
        self._file = path.open("wb")
        self._file.write(len(text).to_bytes(8, "little") + text)
        self._written = 0

    def __enter__(self) -> WeightsWriter:
        return self

    def write(self, piece: Tensor) -> None:
        """The next numbers, in the dtype of their tensor."""
        self._written += self._file.write(raw_bytes(piece).data)

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._file.close()
        assert kind is not None or self._written == self._expected, (self._written, self._expected)


def raw_bytes(tensor: Tensor) -> NDArray[np.uint8]:
    """The numbers of a tensor as they lie in memory."""
    numbers: NDArray[np.uint8] = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
    return numbers
