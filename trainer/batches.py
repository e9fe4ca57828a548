"""Rows as tensors: what one forward of the router gets.

    ids            the cells of a batch          targets
    5 7 2 9 .      0 1 2 3 4                     9 at cell 2, 3 at cell 6: a target stands one cell before its token,
    4 3 . . .      5 6 7 8 9                     where the model predicts it

A row's last token predicts nothing and is left out. Rows are padded on the right, where causal attention lets no token
look: no mask is needed, and the fused attention kernels stay in use.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trainer.loop_inputs import PairLesson, SftLesson
from trainer.rows import Labels, RowSet
from trainer.step_plan import Items


@dataclass(frozen=True, slots=True)
class PaddedRows:
    """Rows side by side.

    Attributes:
        ids: ``[B, L]`` int64, 0 in padding.
        cells: ``[t]`` int64, index into the B L cells of the position that predicts each target.
        gold: ``[t]`` int64, the targets.
        targets: ``[t]`` int64, their index among all targets of the row set.
        owners: ``[t]`` int64, the row 0..B-1 of each target.
        num_tokens: without padding.
    """

    ids: NDArray[np.int64]
    cells: NDArray[np.int64]
    gold: NDArray[np.int64]
    targets: NDArray[np.int64]
    owners: NDArray[np.int64]
    num_tokens: int


def pad(rows: RowSet, chosen: NDArray[np.int64]) -> PaddedRows:
    """The chosen rows of a set, in the given order."""
    starts, lengths = rows.starts[chosen], rows.lengths[chosen]
    width = max(1, int(lengths.max(initial=1)) - 1)
    source = _ranges(starts, lengths)
    owner = np.repeat(np.arange(len(chosen)), lengths)
    column = _ranges(np.zeros(len(chosen), np.int64), lengths)
    tokens, supervised = rows.ids[source], rows.supervised[source]
    ids = np.zeros((max(1, len(chosen)), width), dtype=np.int64)
    kept = column < np.repeat(lengths, lengths) - 1
    ids[owner[kept], column[kept]] = tokens[kept]
    first = rows.target_starts[chosen]
    return PaddedRows(
        ids=ids,
        cells=(owner * width + column - 1)[supervised],
        gold=tokens[supervised].astype(np.int64),
        targets=_ranges(first, rows.target_starts[chosen + 1] - first),
        owners=owner[supervised],
        num_tokens=int(kept.sum()),
    )


@dataclass(frozen=True, slots=True)
class Counts:
    """What the sums of a step are divided by: over all forwards and all processes.

    Attributes:
        targets: of the SFT rows.
        informative: those of them that count for L_expert (set S, or all).
        pairs: preference pairs.
    """

    targets: int
    informative: int
    pairs: int


@dataclass(frozen=True, slots=True)
class Batch:
    """What one forward gets: first SFT rows and their t targets, then 2 P rows of pairs with their u targets.

    Attributes:
        ids: ``[B, L]`` int64.
        cells: ``[t + u]`` int64, index into the B L cells of the position that predicts each target.
        gold: ``[t + u]`` int64.
        gold_logprobs: ``[t + u, n]`` float32, of the experts.
        informative: ``[t]`` bool, which targets count for L_expert.
        owners: ``[u]`` int64, the row 0..2P-1 of each target of pairs; even rows are chosen, odd ones rejected.
        reference_logprobs: ``[2 P]`` float32.
        phase_one_routes: ``[u]`` int64.
        lengths: ``[B]`` int64, tokens of each row.
        tallies: ``[5]`` float32: targets, informative targets, chosen targets, rejected targets, tokens.
        counts: of the whole step.
        step: number of the optimiser step, from 1.
    """

    ids: Tensor
    cells: Tensor
    gold: Tensor
    gold_logprobs: Tensor
    informative: Tensor
    owners: Tensor
    reference_logprobs: Tensor
    phase_one_routes: Tensor
    lengths: Tensor
    tallies: Tensor
    counts: Counts
    step: int

    @property
    def num_sft_targets(self) -> int:
        """t."""
        return len(self.informative)

    @property
    def num_pairs(self) -> int:
        """P."""
        return len(self.reference_logprobs) // 2

    def to(self, device: torch.device) -> Self:
        """The same on a device."""
        if self.ids.device == device:
            return self
        values: dict[str, Any] = {entry.name: getattr(self, entry.name) for entry in fields(self)}
        moved: dict[str, Any] = {
            name: value.to(device, non_blocking=True)
            for name, value in values.items()
            if isinstance(value, Tensor)
        }
        return replace(self, **moved)


class BatchMaker:
    """Makes batches of two lessons.

    Args:
        sft: texts, or None.
        pairs: pairs, or None.
        num_experts: n, of the labels.
        all_targets: L_expert counts every target (`sft.tokens = all`), not those alone where the experts disagree.
    """

    def __init__(
        self, sft: SftLesson | None, pairs: PairLesson | None, num_experts: int, *, all_targets: bool
    ) -> None:
        nothing = RowSet.of([])
        self._sft_rows = sft.rows if sft is not None else nothing
        self._pair_rows = pairs.pairs.rows if pairs is not None else nothing
        self._sft_labels = sft.labels if sft is not None else _no_labels(num_experts)
        self._pair_labels = pairs.labels if pairs is not None else _no_labels(num_experts)
        self._reference = pairs.reference_logprobs if pairs is not None else np.empty(0, np.float32)
        self._routes = pairs.phase_one_routes if pairs is not None else np.empty(0, np.int32)
        self._all_targets = all_targets
        self._informative = self._count_informative()

    @property
    def sft_lengths(self) -> NDArray[np.int64]:
        """``[N]`` tokens of each SFT row."""
        return self._sft_rows.lengths

    @property
    def pair_lengths(self) -> NDArray[np.int64]:
        """``[P]`` tokens of the longer row of each pair."""
        longer: NDArray[np.int64] = self._pair_rows.lengths.reshape(-1, 2).max(axis=1, initial=0)
        return longer

    def counts(self, items: Items) -> Counts:
        """What the sums over these items are divided by."""
        targets = np.diff(self._sft_rows.target_starts)[items.sft_rows]
        return Counts(int(targets.sum()), int(self._informative[items.sft_rows].sum()), len(items.pairs))

    def batch(self, items: Items, counts: Counts, step: int) -> Batch:
        """Tensors of a share of a step.

        Args:
            items: the share.
            counts: of the whole step.
            step: number of the optimiser step, from 1.
        """
        members = (items.pairs[:, None] * 2 + np.arange(2)).reshape(-1)
        sft, pairs = pad(self._sft_rows, items.sft_rows), pad(self._pair_rows, members)
        ids, cells = _beside(sft, pairs, len(items.sft_rows), len(members))
        informative = self._is_informative(self._sft_labels.argmax_ids[sft.targets])
        num_rejected = int((pairs.owners % 2).sum())
        tallies = [
            len(sft.targets),
            int(informative.sum()),
            len(pairs.targets) - num_rejected,
            num_rejected,
            sft.num_tokens + pairs.num_tokens,
        ]
        logprobs = [
            self._sft_labels.gold_logprobs[sft.targets],
            self._pair_labels.gold_logprobs[pairs.targets],
        ]
        lengths = [self._sft_rows.lengths[items.sft_rows], self._pair_rows.lengths[members]]
        return Batch(
            ids=torch.from_numpy(ids),
            cells=torch.from_numpy(cells),
            gold=torch.from_numpy(np.concatenate([sft.gold, pairs.gold])),
            gold_logprobs=torch.from_numpy(np.concatenate(logprobs)),
            informative=torch.from_numpy(informative),
            owners=torch.from_numpy(pairs.owners),
            reference_logprobs=torch.from_numpy(np.array(self._reference[members])),
            phase_one_routes=torch.from_numpy(self._routes[pairs.targets].astype(np.int64)),
            lengths=torch.from_numpy(np.concatenate(lengths)),
            tallies=torch.tensor(tallies, dtype=torch.float32),
            counts=counts,
            step=step,
        )

    def _is_informative(self, argmax_ids: NDArray[np.int32]) -> NDArray[np.bool_]:
        if self._all_targets:
            return np.ones(len(argmax_ids), dtype=np.bool_)
        informative: NDArray[np.bool_] = (argmax_ids != argmax_ids[:, :1]).any(axis=1)
        return informative

    def _count_informative(self) -> NDArray[np.int64]:
        """``[N]`` targets of each SFT row that count for L_expert."""
        before = np.zeros(self._sft_rows.num_targets + 1, dtype=np.int64)
        np.cumsum(self._is_informative(self._sft_labels.argmax_ids), out=before[1:])
        return np.diff(before[self._sft_rows.target_starts])


def _beside(
    sft: PaddedRows, pairs: PaddedRows, num_sft_rows: int, num_pair_rows: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """ids and cells of both in one batch, SFT rows above; one row of padding where there are none."""
    width = max(sft.ids.shape[1], pairs.ids.shape[1])
    ids = np.zeros((max(1, num_sft_rows + num_pair_rows), width), dtype=np.int64)
    ids[:num_sft_rows, : sft.ids.shape[1]] = sft.ids[:num_sft_rows]
    ids[num_sft_rows : num_sft_rows + num_pair_rows, : pairs.ids.shape[1]] = pairs.ids[:num_pair_rows]
    cells = [_widened(sft, width, 0), _widened(pairs, width, num_sft_rows)]
    return ids, np.concatenate(cells)


def _widened(rows: PaddedRows, width: int, first_row: int) -> NDArray[np.int64]:
    row, column = np.divmod(rows.cells, rows.ids.shape[1])
    return (row + first_row) * width + column


def _ranges(starts: NDArray[np.int64], lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    """start, start + 1, ... of each range, one after the other."""
    ends = np.cumsum(lengths)
    total = int(ends[-1]) if len(ends) else 0
    indices: NDArray[np.int64] = np.arange(total) + np.repeat(starts - (ends - lengths), lengths)
    return indices


def _no_labels(num_experts: int) -> Labels:
    return Labels(np.empty((0, num_experts), np.float32), np.empty((0, num_experts), np.int32))
