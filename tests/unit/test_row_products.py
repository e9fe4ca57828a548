"""Products of few rows by our own kernels: torch's up to rounding, the same bits whatever is beside them."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.functional import linear

from fusionroute.engine import prepare_model
from fusionroute.engine.attention import RaggedBatch, Segment
from fusionroute.engine.crew import Crew
from fusionroute.engine.decoder import Decoder
from fusionroute.engine.kernel_cache import kernel_folder, one_compiler
from fusionroute.engine.kv_cache import SessionCache
from fusionroute.engine.row_products import FEWEST_SHARED_BYTES, RowProducts
from tests.tiny_models import eager_rows, tiny_model, word_tokenizer

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
HALF_UNIT = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
"""Largest relative error of a number rounded to the nearest."""


def ready(like: Tensor) -> RowProducts:
    products = RowProducts()
    assert products.prepare(like), "numba is part of the dev extra"
    return products


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@torch.inference_mode()
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (61, 33), (7, 64), (96, 16), (130, 203)])
def test_products_differ_from_the_true_ones_by_their_rounding_only(
    shape: tuple[int, int], dtype: torch.dtype
) -> None:
    weight, bias = torch.randn(shape).to(dtype), torch.randn(shape[0]).to(dtype)
    products = ready(weight)
    for count in (1, 2, 3, 4, 5, 8, 11):
        x = torch.randn((count, 2 * shape[1])).to(dtype)[:, ::2]  # not in one piece
        for added in (None, bias):
            true = linear(x.double(), weight.double(), None if added is None else added.double())
            sizes = linear(x.double().abs(), weight.double().abs(), bias.double().abs())
            limit = HALF_UNIT[dtype] * true.abs() + (shape[1] + 1) * 2.0**-24 * sizes + 2.0**-25
            assert ((products.by_kernel(x, weight, added) - true).abs() <= limit).all(), (
                count,
                added is None,
            )


def test_no_rows_have_no_products() -> None:
    weight = torch.randn(40, 16)
    assert ready(weight).by_kernel(torch.empty(0, 16), weight).shape == (0, 40)


@torch.inference_mode()
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_has_the_same_bits_whatever_is_beside_it(dtype: torch.dtype) -> None:
    weight, rows = torch.randn((50, 333)).to(dtype), torch.randn((13, 333)).to(dtype)
    products = ready(weight)
    wanted = torch.cat([products.by_kernel(row, weight) for row in rows[:, None]])
    for start, stop in ((0, 2), (1, 4), (0, 13), (5, 12)):
        assert torch.equal(products.by_kernel(rows[start:stop], weight), wanted[start:stop])


@torch.inference_mode()
def test_what_is_not_a_number_stays_so() -> None:
    weight = torch.randn((3, 40)).bfloat16()
    weight[1, 7] = float("nan")
    weight[2, 39] = float("inf")
    row = torch.ones((1, 40)).bfloat16()
    found = ready(weight).by_kernel(row, weight)[0]
    assert found[0].isfinite() and found[1].isnan() and found[2].isinf()


@torch.inference_mode()
def test_threads_change_no_bit(two_threads: None) -> None:
    weight = torch.randn((FEWEST_SHARED_BYTES // 128 + 5, 64)).bfloat16()
    rows = torch.randn((3, 64)).bfloat16()
    shared = ready(weight)
    assert shared._crew is not None
    torch.set_num_threads(1)
    assert torch.equal(shared.by_kernel(rows, weight), ready(weight).by_kernel(rows, weight))


def test_a_crew_does_each_chunk_once_for_several_callers_at_a_time() -> None:
    crew, counts, lock = Crew(3), [[0] * 40 for _ in range(4)], threading.Lock()

    def caller(mine: list[int]) -> None:
        def chunk(number: int) -> None:
            with lock:
                mine[number] += 1

        for _ in range(20):
            crew.run(chunk, len(mine))

    callers = [threading.Thread(target=caller, args=(mine,)) for mine in counts]
    for thread in callers:
        thread.start()
    for thread in callers:
        thread.join(30)
    assert counts == [[20] * 40] * 4


@torch.inference_mode()
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", ["gemma2", "llama", "qwen2", "qwen3"])
def test_forwards_of_few_rows_are_the_models_own(family: str, dtype: torch.dtype) -> None:
    """One, two, three ... tokens at a time, by kernels wherever there is one."""
    model = tiny_model(family).to(dtype)
    tokens = [5, 9, 2, 33, 60, 7, 8, 41, 3, 12, 50, 6, 1, 0, 30]
    wanted = eager_rows(model, tokens)
    prepared = prepare_model(model, word_tokenizer(), name="tiny")
    decoder = prepared._network
    assert isinstance(decoder, Decoder) and decoder.has_row_kernels
    products = decoder._products
    products.most_rows = {weight.shape: 8 for layer in decoder._layers for weight in layer.weights}
    decoder._head.layouts = [products.by_kernel] * len(decoder._head.layouts)
    cache, start, rows = SessionCache(len(tokens)), 0, []
    for count in (1, 2, 3, 4, 5):
        batch = RaggedBatch([Segment(cache, start, 0, count)])
        stop = start + count
        rows.append(prepared.forward(batch, tokens[start:stop], range(start, stop), range(count)).rows)
        start = stop
    difference = (torch.cat(rows).float() - wanted.float()).norm() / wanted.float().norm()
    assert difference < {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}[dtype]


def test_compiled_code_is_kept_only_where_nobody_else_may_write(tmp_path: Path) -> None:
    folder = kernel_folder(tmp_path)
    assert folder is not None and folder.stat().st_mode & 0o777 == 0o700
    folder.parent.chmod(0o777)
    assert kernel_folder(tmp_path) is None
    (tmp_path / "file").touch()
    assert kernel_folder(tmp_path / "file") is None


def test_processes_that_start_together_compile_one_after_the_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Locks are of files, so threads stand for processes."""
    monkeypatch.setenv("FUSIONROUTE_CACHE_DIR", str(tmp_path))
    entered = threading.Event()

    def second() -> None:
        with one_compiler():
            entered.set()

    thread = threading.Thread(target=second)
    with one_compiler():
        thread.start()
        assert not entered.wait(0.2)
    assert entered.wait(20)
    thread.join()
    (tmp_path / "kernels").chmod(0o777)
    with one_compiler(), one_compiler():  # nothing is kept: nobody waits
        pass
