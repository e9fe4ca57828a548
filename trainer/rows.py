"""Rendered texts as token ids, all rows in flat arrays.

A *target* is a supervised token: one that the position before it has to predict. Everything that is known
about tokens (labels of experts, log-probabilities under the reference) is kept along one axis of T targets, row
by row in order of position.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

_FILES = ("ids", "supervised", "starts")


@dataclass(frozen=True, slots=True)
class Row:
    """One rendered text.

    Attributes:
        ids: ``[L]`` int32 token ids.
        supervised: ``[L]`` bool, True where the token itself is a target; never at position 0.
    """

    ids: NDArray[np.int32]
    supervised: NDArray[np.bool_]

    @classmethod
    def of(cls, ids: Sequence[int], supervised: Sequence[bool]) -> Row:
        """From plain lists of one length.

        Raises:
            ValueError: lengths differ, or the first token is marked, which nothing can predict.
        """
        if len(ids) != len(supervised):
            raise ValueError(f"{len(ids)} ids but {len(supervised)} marks")
        if len(supervised) > 0 and supervised[0]:
            raise ValueError("the first token is marked as a target, but nothing precedes it")
        return cls(np.asarray(ids, dtype=np.int32), np.asarray(supervised, dtype=np.bool_))

    @property
    def num_targets(self) -> int:
        """Supervised tokens."""
        return int(self.supervised.sum())


@dataclass(frozen=True)
class RowSet:
    """Rows of a data set.

    Attributes:
        ids: ``[sum of lengths]`` int32; may be a read-only memory map.
        supervised: ``[sum of lengths]`` bool.
        starts: ``[N + 1]`` int64, where each row begins.
    """

    ids: NDArray[np.int32]
    supervised: NDArray[np.bool_]
    starts: NDArray[np.int64]

    @classmethod
    def of(cls, rows: Iterable[Row]) -> RowSet:
        """All rows, in their order."""
        kept = list(rows)
        starts = np.zeros(len(kept) + 1, dtype=np.int64)
        np.cumsum([len(row.ids) for row in kept], out=starts[1:])
        if not kept:
            return cls(np.empty(0, np.int32), np.empty(0, np.bool_), starts)
        ids = np.concatenate([row.ids for row in kept])
        return cls(ids, np.concatenate([row.supervised for row in kept]), starts)

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, index: int) -> Row:
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        span = slice(int(self.starts[index]), int(self.starts[index + 1]))
        return Row(self.ids[span], self.supervised[span])

    @cached_property
    def target_starts(self) -> NDArray[np.int64]:
        """``[N + 1]`` where each row's targets begin on the axis of all targets."""
        before = np.zeros(len(self.supervised) + 1, dtype=np.int64)
        np.cumsum(self.supervised, out=before[1:])
        return before[self.starts]

    @property
    def num_targets(self) -> int:
        """T, the targets of all rows."""
        return int(self.target_starts[-1])

    @cached_property
    def lengths(self) -> NDArray[np.int64]:
        """``[N]`` tokens of each row."""
        return np.diff(self.starts)

    @cached_property
    def digest(self) -> str:
        """Of ids, marks and row limits: labels made for one set fit no other."""
        hasher = hashlib.sha256()
        for name in _FILES:
            hasher.update(np.ascontiguousarray(getattr(self, name)).data)
        return hasher.hexdigest()[:32]

    def save(self, folder: Path) -> None:
        """Writes ``ids.npy``, ``supervised.npy`` and ``starts.npy``."""
        folder.mkdir(parents=True, exist_ok=True)
        for name in _FILES:
            np.save(folder / f"{name}.npy", getattr(self, name), allow_pickle=False)

    @classmethod
    def load(cls, folder: Path) -> RowSet:
        """What `save` wrote, memory-mapped."""
        arrays = [np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False) for name in _FILES]
        return cls(*arrays)


@dataclass(frozen=True, slots=True)
class PairSet:
    """Preference pairs: pair j is row 2 j (chosen) and row 2 j + 1 (rejected) of `rows`."""

    rows: RowSet

    def __len__(self) -> int:
        return len(self.rows) // 2


@dataclass(frozen=True, slots=True)
class Labels:
    """What n frozen experts say about the T targets of a `RowSet`.

    Attributes:
        gold_logprobs: ``[T, n]`` float32, log-probability of the target under each expert.
        argmax_ids: ``[T, n]`` int32, each expert's own first choice.
    """

    gold_logprobs: NDArray[np.float32]
    argmax_ids: NDArray[np.int32]
