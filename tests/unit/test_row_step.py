"""All layers as one call: what torch's operations compute one by one, whoever is in the forward."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from fusionroute.engine import LoadedModel, prepare_model
from fusionroute.engine.attention import RaggedBatch, Segment
from fusionroute.engine.decoder import Decoder
from fusionroute.engine.kv_cache import KVCache, SessionCache
from tests.tiny_models import MAX_CONTEXT, WIDTH, tiny_model, word_tokenizer

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
ROUNDING = {torch.float32: 2e-6, torch.float16: 5e-3, torch.bfloat16: 4e-2}
"""Length of the difference from torch's hidden states, relative to theirs: a few roundings in each of three layers."""


def prepared(family: str, dtype: torch.dtype) -> tuple[LoadedModel, Decoder]:
    """A model whose forwards of up to eight rows are single calls, whatever is faster here."""
    model = prepare_model(tiny_model(family).to(dtype), word_tokenizer(), name="tiny")
    decoder = model._network
    assert isinstance(decoder, Decoder) and decoder._step is not None
    decoder._step.most_rows = 8
    return model, decoder


def distance(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


@torch.inference_mode()
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_one_call_computes_what_torch_does_one_by_one(family: str, dtype: torch.dtype) -> None:
    """Ragged forwards of three sessions, some with several tokens, over windows that they outgrow."""
    _, decoder = prepared(family, dtype)
    assert decoder._step is not None
    rng = random.Random(family)
    pairs = [(SessionCache(60), SessionCache(60)) for _ in range(3)]
    fed = [0, 0, 0]
    for round_number in range(20):
        counts = [20, 3, 1] if round_number == 0 else [rng.randint(0, 3) for _ in fed]
        sides: list[list[Segment]] = [[], []]
        ids, positions = list[int](), list[int]()
        for number, count in enumerate(counts):
            if count:
                for side, cache in zip(sides, pairs[number], strict=True):
                    side.append(Segment(cache, fed[number], len(ids), len(ids) + count))
                ids += [rng.randrange(WIDTH) for _ in range(count)]
                positions += range(fed[number], fed[number] + count)
                fed[number] += count
        if not ids:
            continue
        wanted = decoder.hidden_by_torch(RaggedBatch(sides[1]), ids, positions)
        if round_number == 0:  # makes the caches
            decoder.hidden_by_torch(RaggedBatch(sides[0]), ids, positions)
            continue
        found = decoder._step.hidden(RaggedBatch(sides[0]), ids, positions)
        assert found is not None and distance(found, wanted) < ROUNDING[dtype], (round_number, counts)


@torch.inference_mode()
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_of_one_call_has_the_same_bits_whoever_is_beside_it(dtype: torch.dtype) -> None:
    _, decoder = prepared("qwen3", dtype)
    assert decoder._step is not None
    ids, found = [5, 9, 2, 33, 60, 7], []
    for groups in ([[column] for column in range(6)], [[0, 1, 2, 3, 4, 5]], [[0, 1, 2], [3, 4], [5]]):
        caches, hidden = [SessionCache(20) for _ in ids], []
        for cache, first in zip(caches, ids, strict=True):
            decoder.hidden_by_torch(RaggedBatch([Segment(cache, 0, 0, 3)]), [first, 1, 2], range(3))
        for group in groups:
            batch = RaggedBatch([Segment(caches[c], 3, column, column + 1) for column, c in enumerate(group)])
            rows = decoder._step.hidden(batch, [ids[c] for c in group], [3] * len(group))
            assert rows is not None
            hidden.append(rows)
        found.append(torch.cat(hidden))
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


@torch.inference_mode()
def test_rows_are_right_after_caches_have_moved_and_where_beginnings_are_shared() -> None:
    model, decoder = prepared("llama", torch.float32)
    text = [5, 9, 2, 33, 60, 7, 8, 41, 3, 12, 50, 6]
    whole = SessionCache(len(text))
    wanted = model.forward(RaggedBatch([Segment(whole, 0, 0, 12)]), text, range(12), range(12)).rows
    caches = KVCache()
    mine = caches.room("mine", 6, 0)
    rows = [model.forward(RaggedBatch([Segment(mine, 0, 0, 4)]), text[:4], range(4), range(4)).rows]
    for position in range(4, 12):
        if position == 6:
            caches.room("mine", 40, position)
        if position == 9:
            caches.split("mine", "part", 8, position, 20)
        batch = RaggedBatch([Segment(mine, position, 0, 1)])
        assert (decoder._step.hidden(batch, [1], [position]) is None) == (position >= 9)  # type: ignore[union-attr]
        rows.append(model.forward(batch, [text[position]], [position], [0]).rows)
    torch.testing.assert_close(torch.cat(rows), wanted, atol=1e-5, rtol=1e-4)


@torch.inference_mode()
def test_only_wanted_rows_come_back_and_sessions_begin_with_torch() -> None:
    model, decoder = prepared("llama", torch.float32)
    assert decoder._step is not None
    new, ids = SessionCache(10), [5, 9, 2, 33]
    batch = RaggedBatch([Segment(new, 0, 0, 4)])
    assert decoder._step.hidden(batch, ids, range(4)) is None
    model.forward(batch, ids, range(4), [])
    batch = RaggedBatch([Segment(new, 4, 0, 4)])
    whole = model.forward(batch, ids, range(4, 8), range(4)).rows
    torch.testing.assert_close(model.forward(batch, ids, range(4, 8), [3, 1]).rows, whole[[3, 1]])
    assert model.forward(batch, ids, range(4, 8), []).rows.shape == (0, WIDTH)


@torch.inference_mode()
def test_what_lies_outside_of_a_buffer_is_left_to_torch_which_says_so() -> None:
    model, decoder = prepared("llama", torch.float32)
    cache = SessionCache(16)
    model.forward(RaggedBatch([Segment(cache, 0, 0, 8)]), [1] * 8, range(8), [])
    for past, token in ((8, WIDTH), (8, -1), (16, 1)):
        batch = RaggedBatch([Segment(cache, past, 0, 1)])
        assert decoder._step.hidden(batch, [token], [past]) is None  # type: ignore[union-attr]
        with pytest.raises((IndexError, RuntimeError)):
            model.forward(batch, [token], [past], [0])


@torch.inference_mode()
def test_long_sessions_attend_to_all_of_it() -> None:
    """To the last position the model knows, with scores far apart."""
    model, _ = prepared("llama", torch.float32)
    text = [(7 * step + 3) % WIDTH for step in range(MAX_CONTEXT)]
    whole, mine = SessionCache(MAX_CONTEXT), SessionCache(MAX_CONTEXT)
    last = range(MAX_CONTEXT - 6, MAX_CONTEXT)
    wanted = model.forward(RaggedBatch([Segment(whole, 0, 0, 96)]), text, range(96), last).rows
    model.forward(RaggedBatch([Segment(mine, 0, 0, 90)]), text[:90], range(90), [])
    rows = [model.forward(RaggedBatch([Segment(mine, at, 0, 1)]), [text[at]], [at], [0]).rows for at in last]
    assert distance(torch.cat(rows), wanted) < 1e-5
