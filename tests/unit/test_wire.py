"""Tensors on the wire: exact where the format allows it, checked before they are believed."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from fusionroute.engine import EngineLoad, ModelFacts
from fusionroute.errors import InvalidRequest, OutOfRoom, Reason, SessionStateError
from fusionroute.v1 import common_pb2
from fusionroute.wire import (
    dtype_name,
    identity_to_message,
    load_to_message,
    matrix_to_numpy,
    rows_to_matrix,
    step_error_from_message,
    step_error_to_message,
)

FORMATS = [
    (torch.float32, common_pb2.DTYPE_FLOAT32),
    (torch.float16, common_pb2.DTYPE_FLOAT16),
    (torch.bfloat16, common_pb2.DTYPE_BFLOAT16),
]


def some_rows(num_rows: int = 3, width: int = 7) -> torch.Tensor:
    return torch.randn(num_rows, width, generator=torch.Generator().manual_seed(1)) * 100


@pytest.mark.parametrize(("torch_dtype", "wire_dtype"), FORMATS)
def test_rows_in_the_models_own_format_arrive_exactly(torch_dtype: torch.dtype, wire_dtype: Any) -> None:
    rows = some_rows().to(torch_dtype)
    matrix = common_pb2.Matrix.FromString(rows_to_matrix(rows).SerializeToString())
    assert (matrix.dtype, matrix.num_rows, matrix.width) == (wire_dtype, 3, 7)
    assert len(matrix.data) == rows.nbytes
    received = matrix_to_numpy(matrix, 7)
    assert received.dtype == np.float32
    np.testing.assert_array_equal(received, rows.float().numpy())


@pytest.mark.parametrize(("torch_dtype", "wire_dtype"), FORMATS)
def test_rows_are_rounded_once_to_the_format_asked_for(torch_dtype: torch.dtype, wire_dtype: Any) -> None:
    rows = some_rows()
    received = matrix_to_numpy(rows_to_matrix(rows, wire_dtype), 7)
    np.testing.assert_array_equal(received, rows.to(torch_dtype).float().numpy())


def test_a_slice_of_wider_rows_is_packed_without_its_tail() -> None:
    wide = some_rows(width=10)
    received = matrix_to_numpy(rows_to_matrix(wide[1:, :7]), 7)
    np.testing.assert_array_equal(received, wide[1:, :7].numpy())


@pytest.mark.parametrize("torch_dtype", [torch.float32, torch.bfloat16])
def test_no_rows_are_a_matrix_of_the_right_width(torch_dtype: torch.dtype) -> None:
    assert matrix_to_numpy(rows_to_matrix(torch.empty(0, 7, dtype=torch_dtype)), 7).shape == (0, 7)


def test_rows_of_another_width_are_refused_by_name() -> None:
    with pytest.raises(InvalidRequest, match=r"matrix.width = 7 .* logits width is 8"):
        matrix_to_numpy(rows_to_matrix(some_rows()), 8)


@pytest.mark.parametrize("num_rows", [2, 4, 2**32 - 1])
def test_a_matrix_that_lies_about_its_size_is_refused(num_rows: int) -> None:
    matrix = rows_to_matrix(some_rows())
    matrix.num_rows = num_rows
    with pytest.raises(InvalidRequest, match=rf"84 bytes.* {num_rows} rows need {num_rows * 28} bytes"):
        matrix_to_numpy(matrix, 7)


@pytest.mark.parametrize("dtype", [common_pb2.DTYPE_UNSPECIFIED, 9])
def test_a_matrix_in_an_unknown_format_is_refused(dtype: Any) -> None:
    matrix = rows_to_matrix(some_rows())
    matrix.dtype = dtype
    with pytest.raises(InvalidRequest, match=f"dtype = {dtype}"):
        matrix_to_numpy(matrix, 7)


def test_an_identity_carries_every_fact() -> None:
    facts = ModelFacts("name", "weights", "vocabulary", 7, "llama", "bfloat16", 96, 12)
    message = identity_to_message(facts)
    assert [value for _, value in message.ListFields()] == [
        "name", "weights", "vocabulary", 7, "llama", common_pb2.DTYPE_BFLOAT16, 96, 12,
    ]  # fmt: skip
    assert dtype_name(message.dtype) == facts.dtype


def test_a_load_carries_every_number() -> None:
    message = load_to_message(EngineLoad(1, 2, 3, 4, 5, 6, 7))
    assert [value for _, value in message.ListFields()] == [1, 2, 3, 4, 5, 6, 7]
    assert (message.queue_depth, message.kv_tokens_limit, message.num_evictions) == (2, 5, 7)


def test_the_error_of_a_batch_item_arrives_as_it_was() -> None:
    sent = SessionStateError(Reason.POSITION_AHEAD, "ahead", metadata={"cached_length": "4"})
    received = step_error_from_message(step_error_to_message(sent))
    assert type(received) is SessionStateError
    assert (received.reason, received.message, received.cached_length) == (sent.reason, "ahead", 4)
    assert received.retry_after_seconds is None


def test_the_retry_hint_of_a_batch_item_arrives() -> None:
    sent = OutOfRoom(Reason.QUEUE_FULL, "full", retry_after_seconds=0.5)
    assert step_error_from_message(step_error_to_message(sent)).retry_after_seconds == 0.5
