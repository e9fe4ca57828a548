"""What phase I needs from the frozen experts: computed once, kept, read at every step.

Only positions that predict a supervised token matter. They are kept in one flat axis of T tokens, row by row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Targets:
    """The supervised tokens of padded rows.

    Attributes:
        mask: ``[N, L - 1]`` bool, positions whose next token is supervised.
        flat_index: ``[N, L - 1]`` place of a position in the flat axis; meaningless where the mask is False.
        gold: ``[T]`` the tokens to be predicted.
    """

    mask: Tensor
    flat_index: Tensor
    gold: Tensor

    @classmethod
    def of(cls, ids: Tensor, supervised: Tensor) -> Targets:
        """Targets of ``[N, L]`` ids, of which those marked in ``[N, L]`` `supervised` are to be predicted."""
        mask = supervised[:, 1:]
        flat_index = torch.zeros(mask.shape, dtype=torch.int64)
        flat_index[mask] = torch.arange(int(mask.sum()))
        return cls(mask, flat_index, ids[:, 1:][mask])


@dataclass(frozen=True, slots=True)
class ExpertLabels:
    """Opinions of n experts about T tokens.

    Attributes:
        gold_logprobs: ``[T, n]`` fp32, log-probability of the gold token.
        argmax_ids: ``[T, n]`` int64, the expert's own first choice.
        rows: ``[n, T, V]`` logits, kept only where a loss needs whole distributions; else None.
    """

    gold_logprobs: Tensor
    argmax_ids: Tensor
    rows: Tensor | None


def flat_outputs(
    compute: Callable[[Tensor], Tensor], ids: Tensor, targets: Targets, batch_rows: int = 128
) -> Tensor:
    """Outputs ``[T, D]`` of `compute` (ids ``[B, L]`` to ``[B, L, D]``) at the targets, no gradient."""
    pieces = []
    with torch.no_grad():
        for first in range(0, len(ids), batch_rows):
            rows = slice(first, first + batch_rows)
            mask = targets.mask[rows]
            longest = int(mask.any(dim=0).nonzero().max()) + 1 if mask.any() else 1
            pieces.append(compute(ids[rows, :longest])[mask[:, :longest]])
    return torch.cat(pieces)


def gold_logprobs(rows: Tensor, gold: Tensor) -> Tensor:
    """log softmax(rows)[gold]: ``[T, V]`` and ``[T]`` to ``[T]``, in fp32."""
    return torch.log_softmax(rows.float(), dim=1).gather(1, gold[:, None])[:, 0]


def label(
    experts: Sequence[Callable[[Tensor], Tensor]], ids: Tensor, targets: Targets, *, keep_rows: bool = False
) -> ExpertLabels:
    """Ask every expert (ids ``[B, L]`` to logits ``[B, L, V]``) about every target, once."""
    logprobs, argmax_ids, kept = [], [], []
    for expert in experts:
        rows = flat_outputs(expert, ids, targets)
        logprobs.append(gold_logprobs(rows, targets.gold))
        argmax_ids.append(rows.argmax(dim=1))
        if keep_rows:
            kept.append(rows)
    return ExpertLabels(
        torch.stack(logprobs, dim=1), torch.stack(argmax_ids, dim=1), torch.stack(kept) if keep_rows else None
    )
