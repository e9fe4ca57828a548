"""Attention over tokens that several sessions share: all their queries in one product, merged with each one's own.

With parts of the keys attended separately to (outputs o1, o2; logarithms of their weights' sums l1, l2), attention over
all of them is o = w o1 + (1 - w) o2 with w = sigmoid(l1 - l2), and l = log(e^l1 + e^l2).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from fusionroute.engine.kv_cache import SessionCache, SharedView


class Segment(Protocol):
    """Columns [start, stop) of the row, positions from `past` on."""

    cache: SessionCache
    past: int
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class SharedQueries:
    """Who attends to one shared part.

    Attributes:
        view: the part.
        columns: the row's columns that do, [n].
        first_key: first position that anybody sees.
        mask: who sees which of the keys from `first_key` on, bool [n, keys]; None = all see all.
    """

    view: SharedView
    columns: Tensor
    first_key: int
    mask: Tensor | None


def shared_queries(
    segments: Sequence[Segment], window: int | None, device: torch.device
) -> list[SharedQueries]:
    """Who attends to which shared parts, in a layer with this window; the same in all such layers."""
    users: dict[tuple[int, int], tuple[SharedView, list[int], list[int]]] = {}
    for segment in segments:
        for view in segment.cache.shared:
            columns, positions = users.setdefault((id(view.part), view.stop), (view, [], []))[1:]
            for column in range(segment.start, segment.stop):
                position = segment.past + column - segment.start
                if window is None or position - window + 1 < view.stop:
                    columns.append(column)
                    positions.append(position)
    found: list[SharedQueries] = []
    for view, columns, positions in users.values():
        if not columns:
            continue
        first_key, mask = view.part.start, None
        if window is not None:
            first_key = max(first_key, min(positions) - window + 1)
            if max(positions) - window + 1 > first_key:
                keys = torch.arange(first_key, view.stop, device=device)[None, :]
                mask = keys > torch.tensor(positions, device=device)[:, None] - window
        found.append(SharedQueries(view, torch.tensor(columns, device=device), first_key, mask))
    return found


def merge_shared(
    output: Tensor,
    logsums: Tensor,
    layer: int,
    query: Tensor,
    queries: Sequence[SharedQueries],
    scale: float,
    softcap: float | None,
) -> None:
    """Adds what is attended of shared parts to what each session has attended of its own.

    Args:
        output: [n, heads, size], changed.
        logsums: [n, heads] float32, changed.
        layer: whose keys.
        query: [n, heads, size].
        queries: from `shared_queries`.
    """
    for shared in queries:
        keys, values = shared.view.pair(layer, shared.first_key)
        columns = shared.columns
        attended, logsum = attend_part(
            query.index_select(0, columns), keys, values, shared.mask, scale, softcap
        )
        before = logsums.index_select(0, columns)
        weight = torch.sigmoid(before - logsum).unsqueeze(-1).to(attended.dtype)
        output.index_copy_(0, columns, torch.lerp(attended, output.index_select(0, columns), weight))
        logsums.index_copy_(0, columns, torch.logaddexp(before, logsum))


def attend_part(
    query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, scale: float, softcap: float | None
) -> tuple[Tensor, Tensor]:
    """[n, heads, size] over [key-value heads, t, size] -> [n, heads, size] and, in float32, log sums [n, heads].

    Each query must see at least one key.
    """
    num_tokens, num_heads, size = query.shape
    num_key_heads = keys.shape[0]
    groups = num_heads // num_key_heads
    grouped = query.transpose(0, 1).reshape(num_key_heads, groups * num_tokens, size)
    if mask is None and softcap is None and query.device.type == "cpu":
        # The operation behind scaled_dot_product_attention, which keeps the sums to itself.
        attended, logsum = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            grouped[None], keys[None], values[None], scale=scale
        )
        attended, logsum = attended[0], logsum[0]
    else:
        scores = torch.matmul(grouped, keys.transpose(1, 2)).float() * scale
        if softcap is not None:
            scores = torch.tanh(scores / softcap) * softcap
        if mask is not None:
            scores = scores.masked_fill(~mask.repeat(groups, 1), -torch.inf)
        logsum = torch.logsumexp(scores, -1)
        attended = torch.matmul(torch.exp(scores - logsum.unsqueeze(-1)).to(values.dtype), values)
    by_head = attended.reshape(num_heads, num_tokens, values.shape[-1])
    return by_head.transpose(0, 1), logsum.float().reshape(num_heads, num_tokens).transpose(0, 1)
