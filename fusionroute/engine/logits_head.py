"""The product with the vocabulary, more than half of a small model's forward: its layout is chosen by measurement.

The same numbers can be had as `x @ W.T`, row after row, or as `(W @ x.T).T`. Which is faster for a few rows depends on
number format, machine and library, by a factor of up to four either way.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import linear

from fusionroute.engine.exact_tiles import ExactTiles, padded

LAYOUT_ROWS = (1, 2, 4, 8)
"""Numbers of rows that are tried; one between counts as the next lower, more than the last as many."""
FEWEST_BYTES = 8 << 20
"""Smaller heads fit into the processor's caches, where the layouts differ little."""
BUDGET_SECONDS = 1.0
_TIMES = 3
_WORTH = 0.9


class LogitsHead:
    """Hidden states to logits.

    Args:
        weight: [V, H]; not copied.
        softcap: logits become softcap * tanh(logits / softcap).
    """

    def __init__(self, weight: Tensor, softcap: float | None = None) -> None:
        self._weight = weight
        self._softcap = softcap
        self._columns_first = (False,) * (LAYOUT_ROWS[-1] + 1)

    def choose_layouts(self, budget_seconds: float = BUDGET_SECONDS) -> None:
        """Measures the layouts on this machine, within about so many seconds; what was not measured stays plain."""
        weight = self._weight
        if weight.device.type != "cpu" or weight.numel() * weight.element_size() < FEWEST_BYTES:
            return
        deadline = time.monotonic() + budget_seconds
        choices = [False] * len(self._columns_first)
        for count in LAYOUT_ROWS:
            hidden = weight[:count].clone()
            faster = _faster_by_columns(hidden, weight, deadline)
            choices[count:] = [faster] * (len(choices) - count)
        self._columns_first = tuple(choices)

    def __call__(self, hidden: Tensor) -> Tensor:
        """[n, H] -> [n, V]."""
        count = hidden.shape[0]
        if count < len(self._columns_first) and self._columns_first[count]:
            return self._capped(_by_columns(hidden, self._weight))
        return self._capped(linear(hidden, self._weight))

    def exact(self, hidden: Tensor, tiles: ExactTiles) -> Tensor:
        """The same in exact tiles, for any n."""
        count = hidden.shape[0]
        if missing := padded(count) - count:
            hidden = torch.cat((hidden, hidden.new_zeros((missing, hidden.shape[1]))))
        logits = tiles.linear(hidden, self._weight)[:count]
        for row in logits:  # tanh rounds differently where it is vectorised and where not
            self._capped(row)
        return logits

    def _capped(self, logits: Tensor) -> Tensor:
        if self._softcap is None:
            return logits
        return logits.div_(self._softcap).tanh_().mul_(self._softcap)


def _by_columns(hidden: Tensor, weight: Tensor) -> Tensor:
    return torch.mm(weight, hidden.t()).t().contiguous()


def _faster_by_columns(hidden: Tensor, weight: Tensor, deadline: float) -> bool:
    seconds: dict[Callable[[Tensor, Tensor], Tensor], list[float]] = {linear: [], _by_columns: []}
    for _ in range(1 + _TIMES):  # the first is for warming up
        for layout, taken in seconds.items():
            if time.monotonic() > deadline:
                return False
            started = time.perf_counter()
            layout(hidden, weight)
            taken.append(time.perf_counter() - started)
    by_rows, by_columns = (min(taken[1:]) for taken in seconds.values())
    return by_columns < _WORTH * by_rows
