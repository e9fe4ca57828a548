"""The product with the vocabulary, more than half of a small model's forward: its layout is chosen by measurement.

The same numbers can be had as `x @ W.T`, row after row, or as `(W @ x.T).T`, column after column, and one column is
slower than two. Which is fastest for a few rows depends on number format, machine and library, by a factor of up to
four either way; where our own kernels are there, mostly they are.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.functional import linear

from fusionroute.engine.exact_tiles import ExactTiles, padded
from fusionroute.engine.row_products import ASSUMED_ROWS, CLEARLY, RowProducts, are_trusted, measuring_clock

LAYOUT_ROWS = (1, 4, 16, 64)
"""Numbers of rows that are tried; one between counts as the next lower, more than the last go by rows."""
FEWEST_BYTES = 8 << 20
"""Smaller heads fit into the processor's caches, where the layouts differ little."""
BUDGET_SECONDS = 1.0
_TIMES = 6
_WORTH = 0.9
_HOPELESS = 1.5
"""What takes so much longer than the fastest, each of the first times, is not tried again."""
_FIRST_TIMES = 2

Layout = Callable[[Tensor, Tensor], Tensor]


class LogitsHead:
    """Hidden states to logits.

    Args:
        weight: [V, H]; not copied.
        softcap: logits become softcap * tanh(logits / softcap).
        products: where there may be kernels for few rows.
    """

    def __init__(
        self, weight: Tensor, softcap: float | None = None, products: RowProducts | None = None
    ) -> None:
        self._weight = weight
        self._products = products
        self._softcap = softcap
        self.layouts: list[Layout] = [linear] * (LAYOUT_ROWS[-1] + 1)
        # Not by measurement: every process that serves these weights on such a machine must give the same bits.
        is_slow_by_rows = weight.device.type == "cpu" and weight.dtype is torch.float32
        self._tiles = ExactTiles(by_columns if is_slow_by_rows else linear)

    def choose_layouts(self, budget_seconds: float = BUDGET_SECONDS) -> None:
        """Measures the layouts on this machine, within about so many seconds; what was not measured goes by rows."""
        weight = self._weight
        kernel = self._products.by_kernel if self._products is not None and self._products.is_there else None
        self.layouts = [linear] * len(self.layouts)
        layouts: list[Layout] = [linear] if kernel is None else [linear, kernel]
        if weight.device.type != "cpu":
            return
        if weight.numel() * weight.element_size() >= FEWEST_BYTES:
            layouts += [by_columns]
        elif kernel is None:
            return
        deadline = time.monotonic() + budget_seconds
        for count in LAYOUT_ROWS:
            preferred = kernel if kernel is not None and are_trusted(count, weight) else linear
            layout = _fastest(weight[:1].expand(count, -1).contiguous(), weight, layouts, preferred, deadline)
            if layout is None:  # no time left
                is_assumed = count == 1 or (count <= ASSUMED_ROWS and self.layouts[-1] == kernel)
                layout = kernel if is_assumed and kernel is not None else linear
            self.layouts[count:] = [layout] * (len(self.layouts) - count)

    def __call__(self, hidden: Tensor) -> Tensor:
        """[n, H] -> [n, V]."""
        count = hidden.shape[0]
        layout = self.layouts[count] if count < len(self.layouts) else linear
        return self._capped(layout(hidden, self._weight))

    def exact(self, hidden: Tensor) -> Tensor:
        """The same with bits that depend on a row alone, for any n."""
        if self._products is not None and self._products.is_there:
            return self._each_capped(self._products.by_kernel(hidden, self._weight))
        count = hidden.shape[0]
        if missing := padded(count) - count:
            hidden = torch.cat((hidden, hidden.new_zeros((missing, hidden.shape[1]))))
        return self._each_capped(self._tiles.linear(hidden, self._weight)[:count])

    def _each_capped(self, logits: Tensor) -> Tensor:
        for row in logits:  # tanh may round differently where it is vectorised and where not
            self._capped(row)
        return logits

    def _capped(self, logits: Tensor) -> Tensor:
        if self._softcap is None:
            return logits
        return logits.div_(self._softcap).tanh_().mul_(self._softcap)


def by_columns(hidden: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """hidden [n, H] and weight [V, H] -> [n, V]."""
    rows = torch.mm(weight, hidden.t()).t().contiguous()
    return rows if bias is None else rows.add_(bias)


def by_two_columns(hidden: Tensor, weight: Tensor) -> Tensor:
    """The same for one row, computed beside another that nobody wants."""
    return torch.mm(weight, hidden.expand(2, -1).t())[:, :1].t().contiguous()


def _fastest(
    hidden: Tensor, weight: Tensor, layouts: Sequence[Layout], preferred: Layout, deadline: float
) -> Layout | None:
    """The preferred one unless another is worth it; None if there was no time to try each of them twice."""
    if hidden.shape[0] == 1 and by_columns in layouts:
        layouts = [*layouts, by_two_columns]
    seconds = [float("inf")] * len(layouts)
    clock = measuring_clock()
    for attempt in range(1 + _TIMES):  # the first is for warming up
        if attempt > 1 and time.monotonic() > deadline:
            break
        for index, layout in enumerate(layouts):
            if attempt > _FIRST_TIMES and seconds[index] > _HOPELESS * min(seconds):
                continue
            if attempt <= 1 and time.monotonic() > deadline:
                return None
            started = clock()
            layout(hidden, weight)
            if attempt:
                seconds[index] = min(seconds[index], clock() - started)
    best = seconds.index(min(seconds))
    worth = _WORTH if preferred is linear else 1.0 / CLEARLY
    return layouts[best] if seconds[best] < worth * seconds[layouts.index(preferred)] else preferred
