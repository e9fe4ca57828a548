"""Exact rows: the same bits however sessions are batched, chunked and replayed."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor
from torch.nn.functional import linear, silu

from fusionroute.engine import LoadedModel, prepare_model
from fusionroute.engine.activations import by_rows
from fusionroute.engine.attention import RaggedBatch, Segment
from fusionroute.engine.decoder import Decoder
from fusionroute.engine.exact_tiles import TILE, ExactTiles, agreeing_sizes
from fusionroute.engine.kv_cache import SessionCache
from fusionroute.engine.logits_head import LogitsHead, by_columns, by_two_columns
from fusionroute.engine.row_norm import RowNorm
from fusionroute.router_model import Heads
from tests.tiny_models import WIDTH, tiny_model, word_tokenizer

LENGTH = 33
DTYPES = [torch.float32, torch.bfloat16]

Tick = list[tuple[int, int]]
"""Sessions of one forward, each with the number of its next tokens."""


def own_decoder(model: LoadedModel) -> Decoder:
    """What runs the model."""
    network = model._network
    assert isinstance(network, Decoder)
    return network


def exact_rows(
    model: LoadedModel, texts: Sequence[list[int]], ticks: Sequence[Tick]
) -> list[tuple[Tensor, Tensor]]:
    """All rows and head scores of each text, its tokens fed as `ticks` say."""
    caches = [SessionCache(LENGTH) for _ in texts]
    fed = [0] * len(texts)
    rows: list[list[Tensor]] = [[] for _ in texts]
    scores: list[list[Tensor]] = [[] for _ in texts]
    for tick in ticks:
        segments, tokens, positions = list[Segment](), list[int](), list[int]()
        for session, count in tick:
            start = fed[session]
            segments.append(Segment(caches[session], start, len(tokens), len(tokens) + count))
            tokens += texts[session][start : start + count]
            positions += range(start, start + count)
            fed[session] += count
        output = model.forward(RaggedBatch(segments), tokens, positions, range(len(tokens)), exact=True)
        assert output.head_scores is not None
        for segment, (session, _) in zip(segments, tick, strict=True):
            rows[session].append(output.rows[segment.start : segment.stop])
            scores[session].append(output.head_scores[segment.start : segment.stop])
    return [(torch.cat(mine), torch.cat(heads)) for mine, heads in zip(rows, scores, strict=True)]


def random_ticks(rng: random.Random, num_sessions: int, most: int) -> list[Tick]:
    left, ticks = [LENGTH] * num_sessions, list[Tick]()
    while any(left):
        chosen = rng.sample(range(num_sessions), rng.randint(1, num_sessions))
        tick = [(session, min(left[session], rng.randint(1, most))) for session in chosen if left[session]]
        for session, count in tick:
            left[session] -= count
        if tick:
            ticks.append(tick)
    return ticks


@torch.inference_mode()
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("has_kernels", [True, False])
@pytest.mark.parametrize("family", ["gemma2", "llama", "qwen2", "qwen3"])
def test_rows_have_the_same_bits_however_they_are_batched_and_chunked(
    family: str, has_kernels: bool, dtype: torch.dtype
) -> None:
    rng = random.Random(family)
    hidden = tiny_model(family).config.hidden_size
    heads = Heads(torch.randn(3, hidden), torch.randn(3)).to_scores()
    # Odd sizes on purpose: loops with a rest, rows that lie askew in memory.
    model = prepare_model(
        tiny_model(family, intermediate_size=51).to(dtype), word_tokenizer(), name="tiny", heads=heads
    )
    if not has_kernels:
        own_decoder(model).drop_row_kernels()
    texts = [[rng.randrange(WIDTH) for _ in range(LENGTH)] for _ in range(4)]
    alone = [exact_rows(model, [text], [[(0, 1)]] * LENGTH)[0] for text in texts]
    for most in (2, LENGTH):
        together = exact_rows(model, texts, random_ticks(rng, len(texts), most))
        for (row, score), (wanted_row, wanted_score) in zip(together, alone, strict=True):
            assert torch.equal(row, wanted_row), (family, dtype, most)
            assert torch.equal(score, wanted_score), (family, dtype, most)


@torch.inference_mode()
def test_by_kernels_neither_measurements_nor_threads_change_a_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    def rows(num_threads: int, most_rows: int) -> Tensor:
        torch.set_num_threads(num_threads)
        model = prepare_model(tiny_model("llama", intermediate_size=51), word_tokenizer(), name="tiny")
        step = own_decoder(model)._step
        assert step is not None and step.is_for_exact
        step.most_rows = most_rows
        # Each way of feeding them is another measurement's.
        cache = SessionCache(LENGTH)
        counts = (LENGTH - 1, 1) if most_rows else (1, LENGTH - 1)
        found, start = [], 0
        for count in counts:
            batch, positions = RaggedBatch([Segment(cache, start, 0, count)]), range(start, start + count)
            tokens = [(7 * each) % WIDTH for each in positions]
            found.append(model.forward(batch, tokens, positions, range(count), exact=True).rows)
            start += count
        return torch.cat(found)

    monkeypatch.setattr("fusionroute.engine.row_products.FEWEST_SHARED_BYTES", 1)  # the crew helps
    before = torch.get_num_threads()
    try:
        wanted = rows(1, 0)
        for num_threads, most_rows in ((1, 64), (2, 0), (3, 64)):
            assert torch.equal(rows(num_threads, most_rows), wanted)
    finally:
        torch.set_num_threads(before)


def test_with_many_threads_exact_forwards_are_left_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fusionroute.engine.row_step.MOST_EXACT_THREADS", 0)
    step = own_decoder(prepare_model(tiny_model("llama"), word_tokenizer(), name="tiny"))._step
    assert step is not None and not step.is_for_exact


@torch.inference_mode()
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", ["gemma2", "llama"])
def test_exact_rows_are_the_plain_ones_up_to_rounding(family: str, dtype: torch.dtype) -> None:
    model = prepare_model(tiny_model(family).to(dtype), word_tokenizer(), name="tiny")
    tokens, wanted = [5, 9, 2, 33, 60, 7], [5, 0, 3]
    rows = [
        model.forward(
            RaggedBatch([Segment(SessionCache(6), 0, 0, 6)]), tokens, range(6), wanted, exact=exact
        ).rows
        for exact in (False, True)
    ]
    tolerance = 1e-5 if dtype is torch.float32 else 0.1
    torch.testing.assert_close(rows[0], rows[1], atol=tolerance, rtol=tolerance)


@torch.inference_mode()
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(61, 33), (192, 64), (64, 176)])
def test_products_in_tiles_have_the_same_bits_for_any_number_of_rows(
    shape: tuple[int, int], dtype: torch.dtype
) -> None:
    weight, bias = torch.randn(shape, dtype=dtype), torch.randn(shape[0], dtype=dtype)
    rows = torch.randn((3 * 64 + 12, shape[1]), dtype=dtype)
    tiles = ExactTiles()
    wanted = tiles.linear(rows, weight, bias)
    torch.testing.assert_close(wanted, linear(rows, weight, bias), atol=2e-2, rtol=2e-2)
    for count in (4, 8, 12, 20, 64, 76):
        first = 4 * (count // 8)
        assert torch.equal(
            tiles.linear(rows[first : first + count], weight, bias), wanted[first : first + count]
        )


@torch.inference_mode()
def test_only_sizes_of_tiles_that_agree_are_used() -> None:
    """A library that goes another way from 16 rows on, and one whose rows depend on their place."""

    def other_way_from_16(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return linear(x, weight, bias) * (1.0 + 1e-6 * (x.shape[0] >= 16))

    def by_place(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return linear(x, weight, bias) * (1.0 + 1e-6 * torch.arange(x.shape[0])[:, None])

    weight, rows = torch.randn(96, 80), torch.randn(36, 80)
    assert agreeing_sizes(weight, None, other_way_from_16) == (8, 4)
    assert agreeing_sizes(weight, None, by_place) == (1,)
    for product, size in ((other_way_from_16, TILE), (by_place, 1)):
        wanted = torch.cat([product(tile, weight, None) for tile in rows.split(size)])
        tiles = ExactTiles(product)
        assert torch.equal(tiles.linear(rows, weight), wanted)
        assert torch.equal(tiles.linear(rows[16:], weight), wanted[16:])


@torch.inference_mode()
def test_a_norm_has_the_same_bits_at_any_place() -> None:
    rows, norm = torch.randn(101, 24), RowNorm(torch.randn(24), 1e-5)
    wanted = norm(rows, exact=True)
    torch.testing.assert_close(wanted, norm(rows))
    for start in (0, 1, 50, 97):
        assert torch.equal(norm(rows[start : start + TILE], exact=True), wanted[start : start + TILE])


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_activation_has_the_same_bits_whoever_computes_it(dtype: torch.dtype) -> None:
    """So many rows that they are divided among threads, of a length that leaves a rest."""
    rows = torch.randn((3001, 2 * 51), dtype=dtype)[:, :51]
    num_threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        wanted = by_rows(silu)(rows)
    finally:
        torch.set_num_threads(num_threads)
    torch.testing.assert_close(wanted, silu(rows))
    for start in (0, 1, 640, 1500, 2997):
        assert torch.equal(by_rows(silu)(rows[start : start + TILE]), wanted[start : start + TILE])


@torch.inference_mode()
@pytest.mark.parametrize("dtype", DTYPES)
def test_layouts_of_the_vocabulary_differ_by_rounding_only(dtype: torch.dtype) -> None:
    weight = torch.randn((501, 64), dtype=dtype)
    hidden = torch.randn((9, 64), dtype=dtype)
    plain, other = LogitsHead(weight, softcap=30.0), LogitsHead(weight, softcap=30.0)
    other.layouts = [by_columns, by_two_columns, *[by_columns] * 7]
    for count in range(10):
        rows = other(hidden[:count])
        assert rows.shape == (count, 501) and rows.is_contiguous()
        torch.testing.assert_close(rows, plain(hidden[:count]), atol=0.2, rtol=2e-2)
        assert torch.equal(other.exact(hidden[:count]), plain.exact(hidden)[:count])


def test_layouts_are_measured_within_a_budget_and_only_for_large_vocabularies() -> None:
    small, large = LogitsHead(torch.randn(500, 64)), LogitsHead(torch.randn(40_000, 64))
    small.choose_layouts()
    large.choose_layouts(budget_seconds=0.0)
    assert {*small.layouts, *large.layouts} == {linear}
    large.choose_layouts(budget_seconds=5.0)
    assert {*large.layouts} <= {linear, by_columns, by_two_columns}
    for count in (1, 3, 9):
        hidden = torch.randn(count, 64)
        torch.testing.assert_close(large(hidden), linear(hidden, large._weight), atol=1e-4, rtol=1e-4)
