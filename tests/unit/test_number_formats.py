"""Rows from one number format to another, and the search for what is no number."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fusionroute.number_formats import are_finite, as_float32, write_float32

FORMATS = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", FORMATS)
def test_every_number_of_sixteen_bits_becomes_the_float32_that_torch_makes_of_it(dtype: torch.dtype) -> None:
    bits = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(2, -1)
    rows = bits.view(dtype) if dtype.itemsize == 2 else bits.float()
    wanted = rows.float().numpy()
    out = np.full(rows.shape, 7.0, np.float32)
    write_float32(rows, out)
    for found in (as_float32(rows), out):
        assert found.dtype == np.float32
        np.testing.assert_array_equal(found, wanted)


def test_float32_stays_where_it_is() -> None:
    rows = torch.ones(2, 3)
    as_float32(rows)[0, 0] = 5.0
    assert rows[0, 0] == 5.0


@pytest.mark.parametrize("dtype", [*FORMATS, torch.float64])
@pytest.mark.parametrize("spoiled", [float("inf"), float("-inf"), float("nan"), -float("nan")])
@pytest.mark.parametrize("column", [0, 7, 100])
def test_one_infinity_or_nan_spoils_its_row_and_no_other(
    dtype: torch.dtype, spoiled: float, column: int
) -> None:
    largest = torch.finfo(dtype).max
    rows = torch.tensor([-0.0, 0.0, largest, -largest, torch.finfo(dtype).tiny], dtype=dtype).repeat(3, 21)
    assert are_finite(rows) == [True, True, True]
    rows[1, column] = spoiled
    assert are_finite(rows) == [True, False, True]


def test_rows_without_numbers_and_no_rows_are_fine() -> None:
    assert are_finite(torch.empty(2, 0)) == [True, True]
    assert are_finite(torch.empty(0, 5)) == []
