"""Tensors and facts of an engine as messages, and back; sizes are checked before anything is allocated."""

from __future__ import annotations

import mmap
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from fusionroute.errors import FusionRouteError, invalid
from fusionroute.number_formats import widened, write_float32
from fusionroute.rpc_errors import make_error
from fusionroute.v1 import common_pb2, expert_pb2

if TYPE_CHECKING:
    from fusionroute.engine import EngineLoad, ModelFacts

PLACE_ALIGNMENT_BYTES = 8

_TORCH_DTYPES: dict[common_pb2.Dtype.ValueType, torch.dtype] = {
    common_pb2.DTYPE_FLOAT32: torch.float32,
    common_pb2.DTYPE_FLOAT16: torch.float16,
    common_pb2.DTYPE_BFLOAT16: torch.bfloat16,
}
_DTYPES_BY_NAME: dict[str, common_pb2.Dtype.ValueType] = {
    "float32": common_pb2.DTYPE_FLOAT32,
    "float16": common_pb2.DTYPE_FLOAT16,
    "bfloat16": common_pb2.DTYPE_BFLOAT16,
}


def dtype_of(name: str) -> common_pb2.Dtype.ValueType:
    """The wire's number for a model's dtype, "float32", "float16" or "bfloat16".

    Raises:
        KeyError: for any other name; engines have no others.
    """
    return _DTYPES_BY_NAME[name]


def dtype_name(dtype: common_pb2.Dtype.ValueType) -> str:
    """ "float32", "float16", "bfloat16", or "unspecified"."""
    return next((name for name, value in _DTYPES_BY_NAME.items() if value == dtype), "unspecified")


def bytes_per_number(dtype: common_pb2.Dtype.ValueType) -> int:
    """Bytes of one number.

    Raises:
        InvalidRequest: for DTYPE_UNSPECIFIED and unknown values.
    """
    if dtype not in _TORCH_DTYPES:
        raise invalid("dtype", dtype, "one of FLOAT32, FLOAT16, BFLOAT16")
    return _TORCH_DTYPES[dtype].itemsize


@dataclass(frozen=True, slots=True)
class PackedRows:
    """Rows on their way.

    Attributes:
        matrix: what a message says of them, without their bytes.
        data: their bytes; None where they stand in shared memory.
    """

    matrix: common_pb2.Matrix
    data: memoryview | None

    def whole(self) -> common_pb2.Matrix:
        """The matrix with its bytes, which are copied."""
        if self.data is not None:
            self.matrix.data = bytes(self.data)
        return self.matrix


def pack_rows(
    rows: torch.Tensor, dtype: common_pb2.Dtype.ValueType = common_pb2.DTYPE_UNSPECIFIED
) -> PackedRows:
    """Readies logits rows for a message, without a copy where they are in the wanted format.

    Args:
        rows: [n, V], on the CPU, float32, float16 or bfloat16.
        dtype: format on the wire; unspecified keeps that of `rows`.

    Raises:
        InvalidRequest: when the wire has no such format.
    """
    assert rows.ndim == 2, rows.shape
    if dtype == common_pb2.DTYPE_UNSPECIFIED:
        dtype = _DTYPES_BY_NAME[str(rows.dtype).removeprefix("torch.")]
    bytes_per_number(dtype)
    packed = rows.detach().to(_TORCH_DTYPES[dtype]).contiguous()
    matrix = common_pb2.Matrix(dtype=dtype, num_rows=packed.shape[0], width=packed.shape[1])
    # numpy has no bfloat16, so the bytes go through an integer view.
    return PackedRows(matrix, packed.view(torch.uint8).numpy().reshape(-1).data)


def rows_to_matrix(
    rows: torch.Tensor, dtype: common_pb2.Dtype.ValueType = common_pb2.DTYPE_UNSPECIFIED
) -> common_pb2.Matrix:
    """Packs logits rows into a message of their own; arguments and errors as of `pack_rows`."""
    return pack_rows(rows, dtype).whole()


class SharedPlace:
    """Where a caller has room for the rows of one step, in a memory that is shared with it.

    Args:
        memory: as `fusionroute.shared_memory.open_memory` maps it.
        offset, num_bytes: as the caller says, so neither is believed.

    Raises:
        InvalidRequest: the place does not lie within the memory.
    """

    __slots__ = ("_memory", "_num_bytes", "_offset")

    def __init__(self, memory: mmap.mmap, offset: int, num_bytes: int) -> None:
        if offset % PLACE_ALIGNMENT_BYTES:
            raise invalid("shared_offset", offset, f"a multiple of {PLACE_ALIGNMENT_BYTES}")
        if offset + num_bytes > len(memory):
            raise invalid(
                "shared_offset", offset, f"{offset} + {num_bytes} bytes lie beyond the memory's {len(memory)}"
            )
        self._memory, self._offset, self._num_bytes = memory, offset, num_bytes

    def pack(
        self, rows: torch.Tensor, dtype: common_pb2.Dtype.ValueType = common_pb2.DTYPE_UNSPECIFIED
    ) -> PackedRows:
        """As `pack_rows`, writing the rows into the place if they fit there."""
        assert rows.ndim == 2, rows.shape
        if dtype == common_pb2.DTYPE_UNSPECIFIED:
            dtype = _DTYPES_BY_NAME[str(rows.dtype).removeprefix("torch.")]
        num_bytes = rows.numel() * bytes_per_number(dtype)
        if not 0 < num_bytes <= self._num_bytes:
            return pack_rows(rows, dtype)
        if dtype == common_pb2.DTYPE_FLOAT32:
            numbers = np.frombuffer(self._memory, np.float32, rows.numel(), self._offset)
            write_float32(rows.detach(), numbers.reshape(rows.shape))
        else:
            place = torch.frombuffer(
                self._memory, dtype=_TORCH_DTYPES[dtype], count=rows.numel(), offset=self._offset
            )
            place.view(rows.shape).copy_(rows.detach())
        num_rows, width = rows.shape
        matrix = common_pb2.Matrix(dtype=dtype, num_rows=num_rows, width=width, shared_offset=self._offset)
        return PackedRows(matrix, None)


def matrix_to_numpy(
    matrix: common_pb2.Matrix, expected_width: int, data: memoryview | None = None
) -> NDArray[np.float32]:
    """Unpacks logits rows to float32 [n, V]; the array may be read-only.

    Args:
        matrix: from a peer, so nothing about it is believed.
        expected_width: V as the peer's identity promised it.
        data: the bytes of the rows; None = they are in the matrix.

    Raises:
        InvalidRequest: when the width is another, or the bytes are not num_rows * width * bytes-per-number.
    """
    itemsize = bytes_per_number(matrix.dtype)
    if matrix.width != expected_width:
        raise invalid("matrix.width", matrix.width, f"the logits width is {expected_width}")
    held = memoryview(matrix.data) if data is None else data  # every read of a bytes field copies it
    wanted = matrix.num_rows * matrix.width * itemsize
    if held.nbytes != wanted:
        raise invalid("matrix.data", f"{held.nbytes} bytes", f"{matrix.num_rows} rows need {wanted} bytes")
    shape = (matrix.num_rows, matrix.width)
    if not wanted:
        return np.empty(shape, dtype=np.float32)
    if matrix.dtype == common_pb2.DTYPE_FLOAT32:
        return np.frombuffer(held, dtype="<f4").reshape(shape)
    if matrix.dtype == common_pb2.DTYPE_BFLOAT16:
        return widened(np.frombuffer(held, dtype="<u2")).reshape(shape)
    # torch converts float16 several times faster than numpy, but asks for a writable buffer.
    halves = torch.frombuffer(bytearray(held), dtype=_TORCH_DTYPES[matrix.dtype])
    converted: NDArray[np.float32] = halves.float().numpy().reshape(shape)
    return converted


def check_shared(matrix: common_pb2.Matrix, expected_width: int, offset: int, num_bytes: int) -> int:
    """How many float32 numbers of a matrix stand in shared memory.

    Args:
        matrix: from a peer, so nothing about it is believed.
        expected_width: V as the peer's identity promised it.
        offset, num_bytes: the place that the rows were given.

    Raises:
        InvalidRequest: they stand elsewhere, are of another format or width, or do not fit.
    """
    if matrix.dtype != common_pb2.DTYPE_FLOAT32:
        raise invalid("matrix.dtype", matrix.dtype, "FLOAT32 was asked for")
    if matrix.width != expected_width:
        raise invalid("matrix.width", matrix.width, f"the logits width is {expected_width}")
    if matrix.shared_offset != offset:
        raise invalid("matrix.shared_offset", matrix.shared_offset, f"the place begins at {offset}")
    count = matrix.num_rows * matrix.width
    if count * 4 > num_bytes:
        raise invalid("matrix.num_rows", matrix.num_rows, f"the place has {num_bytes} bytes")
    return count


def identity_to_message(facts: ModelFacts) -> common_pb2.ModelIdentity:
    """Which model answers."""
    return common_pb2.ModelIdentity(
        name=facts.name,
        weights_fingerprint=facts.weights_fingerprint,
        tokenizer_fingerprint=facts.tokenizer_fingerprint,
        logits_width=facts.logits_width,
        family=facts.family,
        dtype=dtype_of(facts.dtype),
        max_context_tokens=facts.max_context_tokens,
        epoch=facts.epoch,
    )


def load_to_message(load: EngineLoad) -> common_pb2.Load:
    """What the engine has to do."""
    return common_pb2.Load(
        num_sessions=load.num_sessions,
        queue_depth=load.queue_depth,
        queue_limit=load.queue_limit,
        kv_tokens_used=load.kv_tokens_used,
        kv_tokens_limit=load.kv_tokens_limit,
        num_forwards=load.num_forwards,
        num_evictions=load.num_evictions,
    )


def step_error_to_message(error: FusionRouteError) -> expert_pb2.StepError:
    """Why one item of a StepBatch failed."""
    return expert_pb2.StepError(
        code=int(error.code),
        reason=error.reason.value,
        message=error.message,
        metadata=error.metadata,
        retry_after_seconds=error.retry_after_seconds or 0.0,
    )


def step_error_from_message(message: expert_pb2.StepError) -> FusionRouteError:
    """The error that an item of a StepBatch carries."""
    return make_error(
        message.code,
        message.reason,
        message.message,
        dict(message.metadata),
        message.retry_after_seconds or None,
    )
