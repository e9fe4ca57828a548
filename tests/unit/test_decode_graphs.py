"""Short forwards in padded pieces compute what the plain decoder does; on a GPU also when they are recorded."""

from __future__ import annotations

import random
from itertools import chain

import pytest
import torch

from fusionroute.engine.attention import RaggedBatch, Segment
from fusionroute.engine.decode_graphs import ROW_COUNTS, GraphedDecoder
from fusionroute.engine.decoder import Decoder, decoder_of
from fusionroute.engine.kv_cache import SessionCache
from tests.tiny_models import MAX_CONTEXT, WIDTH, tiny_model

FAMILIES = ["gemma2", "llama", "qwen2", "qwen3"]


def decoders(family: str, device: str = "cpu") -> tuple[GraphedDecoder, Decoder]:
    """One that has recorded its pieces, and a plain one of the same weights."""
    graphed = decoder_of(tiny_model(family).to(device), WIDTH, GraphedDecoder)
    plain = decoder_of(tiny_model(family).to(device), WIDTH)
    assert isinstance(graphed, GraphedDecoder) and plain is not None
    graphed.record()
    return graphed, plain


def compare(graphed: GraphedDecoder, plain: Decoder, device: str = "cpu") -> None:
    """Sessions of different lengths: prompts, then forwards of few and of many rows, longer than any window."""
    rng = random.Random(5)
    lengths = [3, 11, 1, 20, 2]
    caches = [[SessionCache(MAX_CONTEXT) for _ in lengths] for _ in range(2)]
    past = [0] * len(lengths)
    for counts in (
        lengths,
        [1, 0, 0, 0, 0],
        [1] * 5,
        [2, 1, 0, 3, 1],
        [0, 9, 9, 0, 0],
        [1] * 5,
        [7, 0, 0, 9, 5],
    ):
        who = [index for index, count in enumerate(counts) if count]
        tokens = [[rng.randrange(WIDTH) for _ in range(counts[index])] for index in who]
        positions = [past[index] + at for index in who for at in range(counts[index])]
        num_columns = sum(counts)
        wanted = sorted(rng.sample(range(num_columns), rng.randrange(1, num_columns + 1)))
        results = []
        for decoder, mine in zip((graphed, plain), caches, strict=True):
            segments, column = [], 0
            for index in who:
                segments.append(Segment(mine[index], past[index], column, column + counts[index]))
                column += counts[index]
            results.append(decoder.run(RaggedBatch(segments), list(chain(*tokens)), positions, wanted))
        for got, expected in zip(*results, strict=True):
            torch.testing.assert_close(got, expected, atol=2e-5, rtol=1e-4)
        past = [before + count for before, count in zip(past, counts, strict=True)]


@torch.inference_mode()
@pytest.mark.parametrize("family", FAMILIES)
def test_rows_and_hidden_states_are_those_of_the_plain_decoder(family: str) -> None:
    graphed, plain = decoders(family)
    assert list(graphed._steps) == list(ROW_COUNTS)
    compare(graphed, plain)


@torch.inference_mode()
def test_pieces_that_compute_something_else_are_not_used() -> None:
    graphed, _ = decoders("llama")
    step = graphed._steps[4]
    finish = step._end._function
    step._end._function = lambda: (finish()[0] * 1.01,)
    assert "4 rows" in (graphed._why_not() or "")
    other = decoder_of(tiny_model("llama", seed=1), WIDTH, GraphedDecoder)
    assert isinstance(other, GraphedDecoder) and other._steps == {}
    other.choose_layouts()
    assert other._steps == {}, "on a CPU there is nothing to be gained"


@pytest.mark.gpu
@torch.inference_mode()
@pytest.mark.parametrize("family", FAMILIES)
def test_recorded_pieces_compute_what_the_plain_decoder_does(family: str) -> None:
    graphed, plain = decoders(family, "cuda")
    assert list(graphed._steps) == list(ROW_COUNTS), "recording was given up; the log says why"
    assert all(piece._graph is not None for step in graphed._steps.values() for piece in step._pieces)
    compare(graphed, plain, "cuda")
