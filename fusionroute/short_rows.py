"""Choosing a token from the highest logits of an expert instead of all of them: the same token, or none for certain.

Let e be the expert's row, of which only the M highest logits are known, e_(M) the lowest of these, and r the router's
whole row. Then for every id v

    e_v + c r_v  <=  b_v,     b_v = e_v + c r_v where e_v is known, e_(M) + c r_v elsewhere,

with equality among the known ones. Penalties and biases keep the order of two scores of one id, and rounding does.
So if the k best ids of b are all known, they are the k best ids of e + c r, in the same order: nobody unknown can be
better than its bound. Greedy choice is k = 1; sampling with top-k looks at these k only. Otherwise the whole row has
to be asked for.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fusionroute.fusion import Row, Sampling, SeenTokens, adjusted, best_ids, sample_among


@dataclass(frozen=True, slots=True)
class ShortRow:
    """The highest logits of one row.

    Attributes:
        ids: of the known logits [M], highest first, equal ones ascending.
        logits: theirs [M], float32. Every other logit of the row is at most the last of them.
        width: columns of the whole row, V.
    """

    ids: NDArray[np.int64]
    logits: Row
    width: int


def can_choose(sampling: Sampling) -> bool:
    """Whether a choice depends on few of the best scores only, so that short rows are worth asking for."""
    return sampling.temperature == 0.0 or sampling.top_k > 0


def pick_if_certain(
    expert: ShortRow,
    router_row: Row | None,
    sampling: Sampling,
    position: int,
    seen: SeenTokens | None = None,
    *,
    complement: float = 1.0,
) -> int | None:
    """The id that `fusion.pick` picks from e + c r, None where the known logits leave it open.

    Args:
        expert: what is known of e.
        router_row: r [V]; None where the expert's logits count alone.
        sampling, position, seen: as of `fusion.pick`.
        complement: c, above 0.
    """
    if not can_choose(sampling):
        return None
    assert complement > 0.0
    scores = adjusted(_bounds(expert, router_row, complement), sampling, seen)
    if sampling.temperature == 0.0:
        token = int(np.argmax(scores))
        return token if token in expert.ids else None
    if sampling.top_k >= expert.width:
        return None  # as good as no top-k
    best = np.sort(best_ids(scores, sampling.top_k))
    return sample_among(best, scores[best], sampling, position) if np.isin(best, expert.ids).all() else None


def _bounds(expert: ShortRow, router_row: Row | None, complement: float) -> Row:
    """b [V], by the same operations in the same order as `fusion.fuse`, so that known scores are the same bits."""
    if router_row is None:
        bounds: Row = np.full(expert.width, expert.logits[-1], np.float32)
        bounds[expert.ids] = expert.logits
        return bounds
    addend = router_row if complement == 1.0 else np.float32(complement) * router_row
    bounds = expert.logits[-1] + addend
    bounds[expert.ids] = expert.logits + addend[expert.ids]
    return bounds
