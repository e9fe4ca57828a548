"""Attention over ragged batches: tokens of many sessions packed in one row, each against its own cache.

Registered with transformers' `AttentionInterface`, so that the models' own code stays unchanged. The batch travels
through the model's forward as the keyword argument `ragged_batch`. It supports grouped-query attention, soft-capped
scores and sliding windows; any other argument that a model hands to its attention function is refused rather than
ignored.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from fusionroute.engine.kv_cache import SessionCache
from fusionroute.engine.shared_attention import SharedQueries, attend_part, merge_shared, shared_queries

IMPLEMENTATION = "fusionroute_ragged"

_HARMLESS_ARGUMENTS = frozenset(
    {"position_ids", "use_cache", "output_attentions", "output_hidden_states", "is_causal", "cache_position"}
)


@dataclass(slots=True)
class Segment:
    """Tokens of one session within the row: columns [start, stop), positions from `past` on."""

    cache: SessionCache
    past: int
    start: int
    stop: int

    @property
    def own_past(self) -> int:
        """Tokens in the session's own buffers."""
        return self.past - self.cache.num_shared

    @property
    def num_tokens(self) -> int:
        """Tokens of this session in the row."""
        return self.stop - self.start


@dataclass(slots=True)
class RaggedBatch:
    """What the attention function must know of the row.

    Attributes:
        exact: each query alone over its exact keys, in the same shapes whatever else is in the row, so that its result
            has the same bits in any forward.
    """

    segments: list[Segment]
    exact: bool = False
    masks: dict[tuple[int, int | None], Tensor] = field(default_factory=dict)
    is_shared: bool = field(init=False)
    is_one_each: bool = field(init=False)
    _shared: dict[int | None, list[SharedQueries]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.is_shared = any(segment.cache.shared for segment in self.segments)
        self.is_one_each = all(segment.stop - segment.start == 1 for segment in self.segments)

    @property
    def is_plain_decoding(self) -> bool:
        """Whether each session has one token, and memory of its own only."""
        return self.is_one_each and not (self.is_shared or self.exact)

    def shared(self, window: int | None, device: torch.device) -> list[SharedQueries]:
        """Who attends to what several sessions share; the same in all layers, so made once."""
        if window not in self._shared:
            self._shared[window] = shared_queries(self.segments, window, device)
        return self._shared[window]

    def mask(self, index: int, window: int | None, first_key: int, device: torch.device) -> Tensor:
        """Who may see whom, bool [tokens, keys from first_key on]; the same in all layers, so made once."""
        key = (index, window)
        if key not in self.masks:
            segment = self.segments[index]
            stop = segment.own_past + segment.num_tokens
            queries = torch.arange(segment.own_past, stop, device=device)[:, None]
            keys = torch.arange(first_key, stop, device=device)[None, :]
            seen = keys <= queries
            if window is not None:
                seen &= keys > queries - window
            self.masks[key] = seen
        return self.masks[key]


class UnsupportedAttention(Exception):
    """The model needs something of its attention function that this one does not do."""


def ragged_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    ragged_batch: RaggedBatch | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Attention of each segment's tokens over its own session.

    Args:
        module: the attention layer; its `layer_idx` names the cache.
        query: [1, query heads, row length, head size].
        key, value: [1, key-value heads, row length, head size] of the new tokens.
        attention_mask: must be None; the segments say who sees whom.
        scaling: factor of the scores; default 1 / sqrt(head size).
        ragged_batch: the segments of the row.
        sliding_window: keys seen, the token itself included; None = all.
        softcap: scores become softcap * tanh(scores / softcap).

    Returns:
        [1, row length, query heads, head size] and None for the weights.

    Raises:
        UnsupportedAttention: an argument that this function does not know.
    """
    _refuse_unknown(ragged_batch, attention_mask, others)
    assert ragged_batch is not None
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    layer = int(module.layer_idx)  # type: ignore[arg-type]
    queries, keys, values = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    return attend(ragged_batch, layer, queries, keys, values, scale, sliding_window, softcap)[None], None


def attend(
    batch: RaggedBatch,
    layer: int,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    sliding_window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Writes the new keys and values of each segment into its cache, then attends over the whole of it.

    Args:
        batch: the segments of the row.
        layer: whose caches.
        query: [n, query heads, head size], n = columns of the row.
        key, value: [n, key-value heads, head size].
        scale: factor of the scores.
        sliding_window: keys seen, the token itself included; None = all.
        softcap: scores become softcap * tanh(scores / softcap).

    Returns:
        [n, query heads, head size].
    """
    if batch.is_plain_decoding and softcap is None:
        return _attend_decoding(batch, layer, query, key, value, scale, sliding_window)
    output = query.new_empty((query.shape[0], query.shape[1], value.shape[-1]))
    logsums = output.new_empty(output.shape[:2], dtype=torch.float32) if batch.is_shared else None
    for index, segment in enumerate(batch.segments):
        columns = slice(segment.start, segment.stop)
        keys, values = segment.cache.extend(layer, segment.past, key[columns], value[columns])
        if batch.exact:
            for column in range(segment.start, segment.stop):
                end = segment.past + column - segment.start + 1
                begin = 0 if sliding_window is None else max(0, end - sliding_window)
                output[column] = _attend_session(
                    query[column : column + 1], keys[:, begin:end], values[:, begin:end], None, scale, softcap
                )[0]
            continue
        first_key = 0
        if sliding_window is not None:
            first_key = max(0, segment.own_past - sliding_window + 1)
            keys, values = keys[:, first_key:], values[:, first_key:]
        mask = None
        if segment.num_tokens > 1:
            mask = batch.mask(index, sliding_window, first_key, query.device)
        if logsums is None:
            output[columns] = _attend_session(query[columns], keys, values, mask, scale, softcap)
        else:
            output[columns], logsums[columns] = attend_part(
                query[columns], keys, values, mask, scale, softcap
            )
    if logsums is not None:
        shared = batch.shared(sliding_window, query.device)
        merge_shared(output, logsums, layer, query, shared, scale, softcap)
    return output


def _attend_decoding(
    batch: RaggedBatch,
    layer: int,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    sliding_window: int | None,
) -> Tensor:
    """One token of each session: nothing is masked, so what remains are a write and an attention for each."""
    num_tokens, num_heads, size = query.shape
    num_key_heads = key.shape[1]
    queries = query.reshape(num_tokens, 1, num_key_heads, num_heads // num_key_heads, size).unbind(0)
    attended: list[Tensor] = []
    for segment, mine, new_key, new_value in zip(
        batch.segments, queries, key.unbind(0), value.unbind(0), strict=True
    ):
        keys, values = segment.cache.append(layer, segment.past, new_key, new_value)
        if sliding_window is not None and keys.shape[1] > sliding_window:
            first_key = keys.shape[1] - sliding_window
            keys, values = (
                keys.narrow(1, first_key, sliding_window),
                values.narrow(1, first_key, sliding_window),
            )
        attended.append(
            scaled_dot_product_attention(mine, keys.unsqueeze(0), values.unsqueeze(0), scale=scale)
        )
    joined = attended[0] if num_tokens == 1 else torch.cat(attended)
    return joined.reshape(num_tokens, num_heads, value.shape[-1])


def _attend_session(
    query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, scale: float, softcap: float | None
) -> Tensor:
    """[n, query heads, size] over [key-value heads, t, size] -> [n, query heads, size].

    The query heads that share a key-value head are laid side by side as if they were tokens, so that the cache is
    read as it is instead of being repeated.
    """
    num_tokens, num_heads, size = query.shape
    num_shared = keys.shape[0]
    groups = num_heads // num_shared
    grouped = query.transpose(0, 1).reshape(num_shared, groups * num_tokens, size)
    if mask is not None and groups > 1:
        mask = mask.repeat(groups, 1)
    if softcap is None:
        attended = scaled_dot_product_attention(
            grouped[None], keys[None], values[None], attn_mask=mask, scale=scale
        )[0]
    else:
        scores = torch.matmul(grouped, keys.transpose(1, 2)) * scale
        scores = torch.tanh(scores / softcap) * softcap
        if mask is not None:
            scores = scores.masked_fill(~mask, -torch.inf)
        weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
        attended = torch.matmul(weights, values)
    return attended.reshape(num_heads, num_tokens, values.shape[-1]).transpose(0, 1)


def _refuse_unknown(batch: RaggedBatch | None, attention_mask: Tensor | None, others: dict[str, Any]) -> None:
    if batch is None:
        raise UnsupportedAttention("the model does not hand keyword arguments down to its attention function")
    if attention_mask is not None:
        raise UnsupportedAttention("the model makes an attention mask of its own")
    unknown = {name for name, value in others.items() if value is not None} - _HARMLESS_ARGUMENTS
    if unknown:
        raise UnsupportedAttention(f"the model's attention takes {', '.join(sorted(unknown))}")


def register() -> None:
    """Makes transformers know this attention function; calling it again changes nothing."""
    from transformers import AttentionInterface

    AttentionInterface.register(IMPLEMENTATION, ragged_attention)
