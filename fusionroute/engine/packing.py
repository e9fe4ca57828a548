"""Chunks of many sessions as one row of tokens, and its forward."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fusionroute.engine.attention import RaggedBatch, Segment
from fusionroute.engine.kv_cache import KVCache
from fusionroute.engine.model import ForwardOutput, LoadedModel
from fusionroute.engine.steps import Chunk


def run_packed(model: LoadedModel, cache: KVCache, chunks: Sequence[Chunk]) -> ForwardOutput:
    """One forward of all chunks, all exact or none; its rows are those that they want, in their order."""
    segments: list[Segment] = []
    token_ids: list[int] = []
    positions: list[int] = []
    wanted: list[int] = []
    for chunk in chunks:
        session = chunk.job.session
        assert session is not None
        past, column = session.cached_length, len(token_ids)
        count = chunk.stop - chunk.start
        buffers = cache.room(session.session_id, session.reserved_tokens, past)
        segments.append(Segment(buffers, past, column, column + count))
        token_ids.extend(chunk.job.token_ids[chunk.start : chunk.stop])
        positions.extend(range(past, past + count))
        wanted.extend([column + index - chunk.start for index in chunk.wanted])
    exact = chunks[0].job.call.exact
    return model.forward(RaggedBatch(segments), token_ids, positions, wanted, exact=exact)


def joined(parts: list[Tensor]) -> Tensor:
    """Rows of several forwards, copied only where there are several."""
    return parts[0] if len(parts) == 1 else torch.cat(parts)
