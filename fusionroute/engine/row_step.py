"""All layers for one to a few rows as one compiled call, where that is faster than torch's operations one by one.

For plain Llama, Qwen2 and Qwen3 on a CPU with one thread's worth of work: a small model's forward is mostly the calls
of its operations, a hundred for two layers.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import silu

from fusionroute.engine.attention import RaggedBatch, Segment
from fusionroute.engine.kv_cache import SessionCache
from fusionroute.engine.row_products import compiled_kernel, is_numba_there, measuring_clock

if TYPE_CHECKING:
    from fusionroute.engine.decoder import Decoder

MOST_ROWS = 64
"""Of one call."""
MOST_EXACT_THREADS = 4
"""With more of them exact prompts are left to torch, which divides them; where that is faster is a guess."""
PAST_TOKENS = 64
"""Tokens cached before, where rows are measured."""
_TIMES = 3
_WORTH = 0.95

Kernel = Callable[[Any, Any, Any, int, int, int], None]


@cache
def compiled_step(dtype: torch.dtype) -> Kernel | None:
    """The kernel for a number format, compiled or taken from its cache; None where there can be none."""
    if not is_numba_there():
        return None
    kernel: Kernel | None = compiled_kernel("row_step_kernels", "step", dtype)
    return kernel


class RowStep:
    """The layers of one decoder.

    Args:
        decoder: which `can_step`.
        kernel: for its number format.

    Attributes:
        most_rows: up to how many rows it is faster.
        is_for_exact: whether it computes exact forwards, whatever is faster.
    """

    def __init__(self, decoder: Decoder, kernel: Kernel) -> None:
        from fusionroute.engine.row_step_kernels import LAYER_FIELDS, MODEL_FIELDS

        self.most_rows = 0
        self.is_for_exact = torch.get_num_threads() <= MOST_EXACT_THREADS
        self._kernel = kernel
        self._rotary = decoder._rotary
        self._like = decoder._embeddings
        self._num_layers = len(decoder._layers)
        final = decoder._final_norm
        first = decoder._layers[0]
        num_queries, num_keys = first._queries_and_keys
        self._heads = num_keys, first.size
        inner = first._gate_up.shape[0] // 2
        self._kept: list[Tensor] = [decoder._embeddings, final.scale]  # what the addresses point to
        model = [self._num_layers, self._like.shape[1], inner, num_queries, num_keys, first.size]
        model += [self._address(decoder._embeddings), self._address(final.scale)]
        assert len(model) == MODEL_FIELDS
        head_norm = first._query_norm
        floats = [final.floor_squared, 0.0 if head_norm is None else head_norm.floor_squared]
        for layer in decoder._layers:
            maps = [layer._qkv, layer._qkv_bias, layer._o, layer._o_bias]
            maps += [layer._gate_up, layer._gate_up_bias, layer._down, layer._down_bias]
            norms = [layer._before_attention, layer._before_mlp, layer._query_norm, layer._key_norm]
            scales = [None if norm is None else norm.scale for norm in norms]
            fields = [*map(self._address, [*maps, *scales]), layer._window or 0]
            model += fields + [0] * (LAYER_FIELDS - len(fields))
            floats.append(layer._scale)
        self._model = np.array(model, np.int64)
        self._floats = np.array(floats, np.float32)

    def hidden(self, batch: RaggedBatch, token_ids: Sequence[int], positions: Sequence[int]) -> Tensor | None:
        """Final hidden states [n, H]; None if it cannot compute this batch.

        A row's bits depend on its session's tokens alone: not on the rows beside it, nor on how its past was computed,
        if that was computed so too.
        """
        # What lies outside of a buffer is left to torch, which says so.
        is_inside = min(token_ids) >= 0 and max(token_ids) < self._like.shape[0] and min(positions) >= 0
        if batch.is_shared or not is_inside:
            return None
        rows: list[int] = []
        for segment in batch.segments:
            addresses = segment.cache.addresses(self._num_layers)
            if addresses is None or segment.past + segment.num_tokens > addresses[0]:
                return None
            for column in range(segment.start, segment.stop):
                place = segment.past + column - segment.start
                rows += [token_ids[column], positions[column], place, *addresses]
        angles = self._rotary.table(max(positions) + 1)
        table = np.array(rows, np.int64).reshape(len(token_ids), -1)
        out = self._like.new_empty((len(token_ids), self._like.shape[1]))
        for start in range(0, len(token_ids), MOST_ROWS):
            part = table[start : start + MOST_ROWS]
            to = out[start:].data_ptr()
            self._kernel(self._model, self._floats, part.reshape(-1), angles.data_ptr(), to, len(part))
        return out

    def allocate(self, batch: RaggedBatch) -> None:
        """Gives new sessions their buffers, which otherwise come with the first tokens that torch computes."""
        for segment in batch.segments:
            segment.cache.allocate(self._num_layers, self._like, self._heads)

    def choose(self, decoder: Decoder, deadline: float) -> None:
        """Measures up to how many rows it is faster than the decoder's layers, until a deadline (monotonic)."""
        past = min(PAST_TOKENS, self._rotary.num_known - 1)
        first = SessionCache(past + 1)
        decoder.run(RaggedBatch([Segment(first, 0, 0, past + 1)]), [0] * (past + 1), range(past + 1), [])
        caches = [first]
        while len(caches) <= MOST_ROWS and self._is_faster(decoder, caches, past, deadline):
            self.most_rows = len(caches)
            caches += [first.copied(past + 1, past + 1) for _ in caches]

    def _is_faster(
        self, decoder: Decoder, caches: Sequence[SessionCache], past: int, deadline: float
    ) -> bool:
        ids, positions = [0] * len(caches), [past] * len(caches)
        clock = measuring_clock()
        seconds = [float("inf"), float("inf")]
        for attempt in range(1 + _TIMES):
            for is_ours in (True, False):
                if time.monotonic() > deadline:
                    return False
                segments = [Segment(each, past, column, column + 1) for column, each in enumerate(caches)]
                started = clock()
                if is_ours:
                    self.hidden(RaggedBatch(segments), ids, positions)
                else:
                    decoder.hidden_by_torch(RaggedBatch(segments), ids, positions)
                if attempt:
                    seconds[is_ours] = min(seconds[is_ours], clock() - started)
        return seconds[True] < _WORTH * seconds[False]

    def _address(self, tensor: Tensor | None) -> int:
        if tensor is None:
            return 0
        assert tensor.is_contiguous()
        self._kept.append(tensor)
        return tensor.data_ptr()


def can_step(decoder: Decoder) -> bool:
    """Whether the kernel computes what this decoder does: nothing scaled, capped or normed beside the usual."""
    if (
        decoder._scale is not None
        or decoder._activate is not silu
        or decoder._embeddings.device.type != "cpu"
    ):
        return False
    return (
        all(
            layer._softcap is None
            and layer._after_attention is None
            and layer._after_mlp is None
            and (layer._query_norm is None) == (layer._key_norm is None)
            and layer.size % 2 == 0
            for layer in decoder._layers
        )
        and decoder._embeddings.is_contiguous()
    )
