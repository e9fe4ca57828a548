"""Which rows are learnt from at which step: a pure function of sizes, lengths and seed.

An optimiser step learns from `rows_per_step` rows, whatever the number of processes and accumulated forwards they are
divided over. So one forward of 8 rows, four of 2, and two processes with 4 each compute the same gradient.

    epoch      all pairs (two rows each) and `sft_rows_per_pair` SFT rows for each, shuffled; without pairs all SFT rows
    step       the next rows of the epoch; the last step of an epoch takes what is left
    share      the part of a step that one forward of one process sees, rows of like length together
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from trainer.config import TrainingTable

_SFT_DRAWS, _ORDER = 1, 2  # streams of random numbers that must not be one


@dataclass(frozen=True, slots=True)
class Items:
    """What a step, or a share of one, learns from. A share may be empty in the last step of an epoch.

    Attributes:
        sft_rows: indices into the rows of the SFT lesson.
        pairs: indices of pairs.
    """

    sft_rows: NDArray[np.int64]
    pairs: NDArray[np.int64]


@dataclass
class StepPlan:
    """The steps of a run.

    Attributes:
        table: seed, epochs, batch_rows, accumulation_steps.
        sft_lengths: ``[N]`` tokens of each SFT row; empty without SFT rows.
        pair_lengths: ``[P]`` tokens of the longer answer of each pair; empty without pairs.
        sft_rows_per_pair: SFT rows drawn for each pair, where there are pairs.
        world_size: processes.

    Raises:
        ValueError: there is nothing to learn from.
    """

    table: TrainingTable
    sft_lengths: NDArray[np.int64]
    pair_lengths: NDArray[np.int64]
    sft_rows_per_pair: float
    world_size: int = 1
    _epoch: tuple[int, list[Items]] | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        if self._num_rows == 0:
            raise ValueError("there are neither SFT rows nor pairs to learn from")

    @property
    def batch_rows(self) -> int:
        """Most rows of one share. A pair takes two and is never divided, so with pairs it is even."""
        rows = self.table.batch_rows
        return rows if len(self.pair_lengths) == 0 else max(2, rows - rows % 2)

    @property
    def rows_per_step(self) -> int:
        """Rows of one optimiser step."""
        return self.batch_rows * self.table.accumulation_steps * self.world_size

    @property
    def steps_per_epoch(self) -> int:
        """Optimiser steps of one epoch."""
        return math.ceil(self._num_rows / self.rows_per_step)

    @property
    def num_steps(self) -> int:
        """Optimiser steps of the run."""
        return self.table.max_steps or max(1, math.ceil(self.table.epochs * self.steps_per_epoch - 1e-9))

    @property
    def _num_drawn(self) -> int:
        """SFT rows of one epoch."""
        if len(self.pair_lengths) == 0:
            return len(self.sft_lengths)
        return round(len(self.pair_lengths) * self.sft_rows_per_pair) if len(self.sft_lengths) else 0

    @property
    def _num_rows(self) -> int:
        return 2 * len(self.pair_lengths) + self._num_drawn

    def items(self, step: int) -> Items:
        """What step 0, 1, ... learns from."""
        epoch, within = divmod(step, self.steps_per_epoch)
        if self._epoch is None or self._epoch[0] != epoch:
            steps = _cut(self._epoch_order(epoch), self._drawn(epoch), self.rows_per_step)
            assert len(steps) == self.steps_per_epoch
            self._epoch = epoch, steps
        return self._epoch[1][within]

    def shares(self, step: int) -> list[Items]:
        """A step divided: process r sees shares r, r + world_size, ... one after the other."""
        return _divide(
            self.items(step),
            self.sft_lengths,
            self.pair_lengths,
            self.table.accumulation_steps * self.world_size,
        )

    def _drawn(self, epoch: int) -> NDArray[np.int64]:
        """SFT rows of an epoch: the next of an endless row of permutations, so that all come equally often."""
        total = len(self.sft_lengths)
        first, last = epoch * self._num_drawn, (epoch + 1) * self._num_drawn
        if first == last:
            return np.empty(0, np.int64)
        rounds = [
            self._permutation(_SFT_DRAWS, index, total) for index in range(first // total, -(-last // total))
        ]
        offset = first - first // total * total
        return np.concatenate(rounds)[offset : offset + self._num_drawn]

    def _epoch_order(self, epoch: int) -> NDArray[np.int64]:
        """The epoch's items in the order of learning: pair j as j, SFT rows as -1."""
        num_pairs = len(self.pair_lengths)
        order = self._permutation(_ORDER, epoch, num_pairs + self._num_drawn)
        return np.where(order < num_pairs, order, -1)

    def _permutation(self, stream: int, index: int, size: int) -> NDArray[np.int64]:
        return np.random.default_rng([self.table.seed, stream, index]).permutation(size)


def _cut(order: NDArray[np.int64], drawn: NDArray[np.int64], rows_per_step: int) -> list[Items]:
    """Cuts an epoch into steps of equally many rows; a pair that does not fit lets the next SFT row go first."""
    if len(drawn) == len(order):
        cuts = range(0, len(drawn), rows_per_step)
        return [Items(drawn[cut : cut + rows_per_step], np.empty(0, np.int64)) for cut in cuts]
    singles = deque(int(row) for row in drawn)
    early = 0  # SFT rows that were taken before their turn
    steps: list[Items] = []
    sft_rows: list[int] = []
    pairs: list[int] = []
    for item in order:
        is_pair = item >= 0
        if not is_pair and early > 0:
            early -= 1
            continue
        room = rows_per_step - len(sft_rows) - 2 * len(pairs)
        if is_pair and room == 1 and singles:
            sft_rows.append(singles.popleft())
            early += 1
            room = 0
        if room < 1 + is_pair:
            steps.append(_items(sft_rows, pairs))
            sft_rows, pairs = [], []
        if is_pair:
            pairs.append(int(item))
        else:
            sft_rows.append(singles.popleft())
    steps.append(_items(sft_rows, pairs))
    return steps


def _items(sft_rows: Sequence[int], pairs: Sequence[int]) -> Items:
    return Items(np.asarray(sft_rows, np.int64), np.asarray(pairs, np.int64))


def _divide(
    items: Items, sft_lengths: NDArray[np.int64], pair_lengths: NDArray[np.int64], num_shares: int
) -> list[Items]:
    """Longest first, each item into the first share with room: like lengths meet, and little is padded."""
    has_pairs = len(items.pairs) > 0
    num_rows = len(items.sft_rows) + 2 * len(items.pairs)
    capacity = -(-num_rows // num_shares)
    capacity += capacity % 2 if has_pairs else 0
    lengths = np.concatenate([sft_lengths[items.sft_rows], pair_lengths[items.pairs]])
    sizes = np.repeat([1, 2], [len(items.sft_rows), len(items.pairs)])
    room = [capacity] * num_shares
    members: list[list[int]] = [[] for _ in range(num_shares)]
    for index in np.argsort(-lengths, kind="stable"):
        share = next(share for share, free in enumerate(room) if free >= sizes[index])
        room[share] -= int(sizes[index])
        members[share].append(int(index))
    return [_share(items, np.asarray(sorted(member), np.int64)) for member in members]


def _share(items: Items, member: NDArray[np.int64]) -> Items:
    num_sft = len(items.sft_rows)
    return Items(items.sft_rows[member[member < num_sft]], items.pairs[member[member >= num_sft] - num_sft])
