"""Labels from experts that are loaded here, one at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from fusionroute.router_model import ExpertRecord
from trainer.config import ExpertSource
from trainer.frozen_models import FrozenModel, check_same_vocabulary
from trainer.label_sources import Pending, check_context
from trainer.label_store import LabelStore, Span
from trainer.pace import Pace
from trainer.rows import Row, RowSet
from trainer.run_context import Stop


class LocalLabels:
    """A `LabelSource` of models on disk or on a hub.

    Args:
        experts: by slot.
        batch_tokens: padded tokens of one forward.
        device: a torch device, or "auto".
    """

    def __init__(self, experts: Mapping[str, ExpertSource], batch_tokens: int, device: str = "auto") -> None:
        self._experts = experts
        self._batch_tokens = batch_tokens
        self._device = _accelerator() if device == "auto" else device

    def find_experts(self, stop: Stop) -> tuple[ExpertRecord, ...]:
        """Loads each of them for its fingerprint; once in a process while its files stay the same."""
        records = []
        for slot, source in self._experts.items():
            stop.check()
            records.append(_record(slot, source.model, source.name, _state_of(source.model)))
            check_same_vocabulary(records[0], records[-1])
        return tuple(records)

    def label(self, rows: RowSet, pending: Pending, store: LabelStore, pace: Pace, stop: Stop) -> None:
        """One expert after the other."""
        for slot, spans in pending.items():
            if spans:
                stop.check()
                expert = FrozenModel.load(self._experts[slot], slot, self._device)
                check_context(rows, slot, expert.max_context_tokens)
                for span in spans:
                    gold, argmax = self._label_span(rows, span, expert, pace)
                    store.put(slot, span, gold, argmax)
                del expert  # before the next one is loaded

    def _label_span(
        self, rows: RowSet, span: Span, expert: FrozenModel, pace: Pace
    ) -> tuple[NDArray[np.float32], NDArray[np.int32]]:
        gold = np.empty(span.num_targets, np.float32)
        argmax = np.empty(span.num_targets, np.int32)
        for indices in _batches(rows, span, self._batch_tokens):
            batch = [rows[index] for index in indices]
            logprobs, choices = _ask(expert, batch)
            done = 0
            for index, row in zip(indices, batch, strict=True):
                start = int(rows.target_starts[index]) - span.target_first
                target = slice(start, start + row.num_targets)
                gold[target] = logprobs[done : done + row.num_targets]
                argmax[target] = choices[done : done + row.num_targets]
                done += row.num_targets
            pace.advance(done)
        return gold, argmax


@torch.no_grad()
def _ask(expert: FrozenModel, batch: list[Row]) -> tuple[NDArray[np.float32], NDArray[np.int32]]:
    """Gold log-probs and first choices ``[t]`` of the targets of some rows, row by row."""
    lengths = [
        int(np.flatnonzero(row.supervised)[-1]) for row in batch
    ]  # nothing is predicted behind the last target
    ids = torch.zeros((len(batch), max(lengths)), dtype=torch.long)
    before = torch.zeros_like(ids, dtype=torch.bool)
    for place, (row, length) in enumerate(zip(batch, lengths, strict=True)):
        ids[place, :length] = torch.from_numpy(row.ids[:length].astype(np.int64))
        before[place, :length] = torch.from_numpy(row.supervised[1 : length + 1].copy())
    gold = np.concatenate([row.ids[row.supervised] for row in batch]).astype(np.int64)
    hidden = expert.hidden(ids, torch.tensor(lengths))
    statistics = expert.head.statistics(
        hidden[before.to(hidden.device)], torch.from_numpy(gold).to(hidden.device)
    )
    return (
        statistics.gold_logprobs.float().cpu().numpy(),
        statistics.choices.to("cpu", torch.int32).numpy(),
    )


def _batches(rows: RowSet, span: Span, batch_tokens: int) -> Iterator[list[int]]:
    """Rows of similar length together, longest first; rows without a target are passed over."""
    with_targets = [
        index
        for index in range(span.first, span.end)
        if rows.target_starts[index + 1] > rows.target_starts[index]
    ]
    with_targets.sort(key=lambda index: (-int(rows.lengths[index]), index))
    batch: list[int] = []
    for index in with_targets:
        if batch and (len(batch) + 1) * int(rows.lengths[batch[0]]) > batch_tokens:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def _accelerator() -> str:
    found = torch.accelerator.current_accelerator()
    return "cpu" if found is None else found.type


def _state_of(model: str) -> tuple[tuple[str, int, int], ...]:
    """Names, sizes and times of a model's files; empty for a hub id, which stays what it was in one process."""
    folder = Path(model).expanduser()
    if not folder.is_dir():
        return ()
    files = sorted(path for path in folder.iterdir() if path.is_file())
    return tuple((path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files)


@lru_cache(maxsize=64)
def _record(slot: str, model: str, name: str, _state: tuple[tuple[str, int, int], ...]) -> ExpertRecord:
    return FrozenModel.load(ExpertSource(model=model, name=name), slot).record
