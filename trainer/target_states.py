"""Hidden states of frozen models at targets: computed once where a model stands still."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trainer.frozen_models import FrozenModel
from trainer.rows import Labels, RowSet
from trainer.run_context import RunContext, RunProgress

BATCH_TOKENS = 8192
CPU_BATCH_TOKENS = 2048  # what stays in a core's cache: in half the time


@dataclass(frozen=True, slots=True)
class TargetSample:
    """Some rows of a set, and what is known about their targets.

    Attributes:
        rows: the chosen rows alone.
        gold: ``[T]`` int64, the targets.
        gold_logprobs: ``[T, n]`` float32, of the experts.
        argmax_ids: ``[T, n]`` int64, of the experts.
    """

    rows: RowSet
    gold: Tensor
    gold_logprobs: Tensor
    argmax_ids: Tensor

    @classmethod
    def draw(cls, rows: RowSet, labels: Labels, max_targets: int, seed: int) -> TargetSample:
        """Whole rows in random order until `max_targets` is reached; all rows where they have no more."""
        chosen = np.arange(len(rows))
        if rows.num_targets > max_targets:
            order = np.random.default_rng(seed).permutation(len(rows))
            counts = np.diff(rows.target_starts)[order]
            chosen = np.sort(order[: max(1, int(np.searchsorted(np.cumsum(counts), max_targets, "right")))])
        picked = RowSet.of(rows[int(index)] for index in chosen)
        starts = rows.target_starts
        at = [np.arange(starts[index], starts[index + 1]) for index in chosen]
        flat = np.concatenate(at) if at else np.empty(0, np.int64)
        return cls(
            picked,
            torch.from_numpy(picked.ids[picked.supervised].astype(np.int64)),
            torch.from_numpy(np.ascontiguousarray(labels.gold_logprobs[flat])),
            torch.from_numpy(labels.argmax_ids[flat].astype(np.int64)),
        )

    def __len__(self) -> int:
        return len(self.gold)


def states_at_targets(
    model: FrozenModel, rows: RowSet, context: RunContext, *, stage: str, kept: Tensor | None = None
) -> Tensor:
    """Final hidden states of `model` at the positions that predict the rows' targets.

    Args:
        model: any causal LM of the rows' vocabulary.
        stage: under which progress is reported.
        kept: ``[T]`` bool, the targets wanted; None for all. Rows without any are not computed.

    Returns:
        ``[K, H]`` float32 on the CPU, in the order of the (wanted) targets.
    """
    wanted = np.ones(rows.num_targets, np.bool_) if kept is None else kept.numpy()
    places = np.cumsum(wanted) - 1
    states: Tensor | None = None
    done, useful = 0, _rows_with(rows, wanted)
    for batch in _batches(rows, useful, CPU_BATCH_TOKENS if model.model.device.type == "cpu" else BATCH_TOKENS):
        context.stop.check()
        ids, lengths, where, flat = _padded(rows, batch)
        hidden = model.hidden(ids, lengths)
        selected = wanted[flat]
        found = hidden[where[0][selected], where[1][selected]].float().cpu()
        if states is None:
            states = torch.empty(int(wanted.sum()), found.shape[1])
        states[torch.from_numpy(places[flat[selected]])] = found
        done += len(batch)
        context.report(RunProgress(stage, done, len(useful)))
    return states if states is not None else torch.empty(0, 0)


@torch.no_grad()
def gold_logprobs_at_targets(model: FrozenModel, states: Tensor, gold: Tensor) -> Tensor:
    """log p(target) ``[T]`` under `model` of its states ``[T, H]``, float32 on the CPU."""
    device = model.head.weight.device
    pieces = [
        model.head.gold_logprobs(some.to(device), ids.to(device)).cpu()
        for some, ids in zip(torch.split(states, BATCH_TOKENS), torch.split(gold, BATCH_TOKENS), strict=True)
    ]
    return torch.cat(pieces) if pieces else torch.empty(0)


def _rows_with(rows: RowSet, wanted: NDArray[np.bool_]) -> NDArray[np.int64]:
    """The rows that have wanted targets, the shortest first."""
    starts = rows.target_starts
    counted = np.concatenate([[0], np.cumsum(wanted)])
    useful = np.flatnonzero(counted[starts[1:]] > counted[starts[:-1]])
    return useful[np.argsort(rows.lengths[useful], kind="stable")]


def _batches(rows: RowSet, order: NDArray[np.int64], batch_tokens: int) -> Iterator[Sequence[int]]:
    """Rows of like length together, at most `batch_tokens` padded tokens at a time."""
    batch: list[int] = []
    for index in order:
        if batch and (len(batch) + 1) * int(rows.lengths[index]) > batch_tokens:
            yield batch
            batch = []
        batch.append(int(index))
    if batch:
        yield batch


def _padded(
    rows: RowSet, batch: Sequence[int]
) -> tuple[Tensor, Tensor, tuple[NDArray[np.int64], NDArray[np.int64]], NDArray[np.int64]]:
    """ids [B, L], lengths [B], (row, position) that predict each target, and the targets' flat indices."""
    lengths = rows.lengths[list(batch)]
    ids = np.zeros((len(batch), int(lengths.max())), dtype=np.int64)
    row_at, position_at, flat = [], [], []
    for place, index in enumerate(batch):
        row = rows[index]
        ids[place, : len(row.ids)] = row.ids
        positions = np.flatnonzero(row.supervised) - 1
        row_at.append(np.full(len(positions), place, dtype=np.int64))
        position_at.append(positions)
        flat.append(np.arange(rows.target_starts[index], rows.target_starts[index + 1]))
    where = (np.concatenate(row_at), np.concatenate(position_at))
    return torch.from_numpy(ids), torch.from_numpy(lengths), where, np.concatenate(flat)
