"""Products of one to a few rows on a CPU by kernels of our own, where they are faster than torch's.

    linear(x [n, K], weight [N, K])    n <= 64, measured: each row of weights is read once, at the speed of memory

Torch takes 1.5 to 3 times as long for up to 16 rows. Without numba, on other devices, or where a measurement at load
says so, everything is torch's.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import structlog
import torch
from torch import Tensor
from torch.nn import functional

from fusionroute.engine.crew import Crew, crew_of

ROW_COUNTS = (1, 2, 4, 8, 16, 64)
"""Numbers of rows that are tried; more than the last are torch's."""
ASSUMED_ROWS = 16
"""Where there was no time to measure, kernels are taken to be faster for one row, and up to here if for fewer."""
BUDGET_SECONDS = 1.0
FEWEST_SHARED_BYTES = 4 << 20
"""Products of smaller weights are not divided among threads: waking one takes as long."""
CHUNKS_PER_THREAD = 3
CLEARLY = 1.3
"""By how much torch has to be faster where kernels are trusted."""
_TIMES = 6
_WORTH = 0.95

FORMATS = {torch.bfloat16: "bfloat16", torch.float16: "float16", torch.float32: "float32"}
"""Number formats that there are kernels for."""

Kernel = Callable[[int, int, int, int, int, int, int, int, int], None]
"""(weight, bias or 0, rows, out: addresses; first and last output, outputs, length, rows)."""

log = structlog.get_logger(__name__)


def is_numba_there() -> bool:
    """Whether kernels can be compiled, as far as can be told without importing anything."""
    return find_spec("numba") is not None


@cache
def compiled_linear(dtype: torch.dtype) -> Kernel | None:
    """The kernel for a number format, compiled or taken from its cache; None where there can be none."""
    if not is_numba_there():
        log.info("row_kernels_missing", why="numba is not installed", advice="install fusionroute[cpu]")
        return None
    kernel: Kernel | None = compiled_kernel("row_kernels", "linear", dtype)
    return kernel


def compiled_kernel(module: str, name: str, dtype: torch.dtype) -> Any:
    """`name`_bfloat16, _float16 or _float32 of a module of this package, compiled as its `NAME_SIGNATURE` says.

    None for other number formats, and where it cannot be compiled: a broken installation must not keep a model from
    serving.
    """
    if dtype not in FORMATS:
        return None
    try:
        from fusionroute.engine.kernel_cache import kernels_kept, one_compiler

        with kernels_kept():
            kernels = import_module(f"fusionroute.engine.{module}")
        kernel = getattr(kernels, f"{name}_{FORMATS[dtype]}")
        with one_compiler():
            kernel.compile(getattr(kernels, f"{name.upper()}_SIGNATURE"))
    except Exception as error:
        log.warning("row_kernels_missing", why=f"{type(error).__name__}: {error}")
        return None
    return kernel


def are_trusted(num_rows: int, weight: Tensor) -> bool:
    """Whether kernels are faster by far as a rule: memory is the limit.

    Other programs may disturb a measurement, those above all that start at the same time.
    """
    return num_rows <= ASSUMED_ROWS and weight.numel() * weight.element_size() >= FEWEST_SHARED_BYTES


def measuring_clock() -> Callable[[], float]:
    """What to measure products with: with one thread its own time, which other programs do not disturb."""
    return time.thread_time if torch.get_num_threads() == 1 else time.perf_counter


class RowProducts:
    """`linear` for one model. Before `choose`, and after `drop`, all is torch's.

    Attributes:
        most_rows: by shape of weights, up to how many rows the kernels are faster.
    """

    def __init__(self) -> None:
        self.most_rows: dict[torch.Size, int] = {}
        self._kernel: Kernel | None = None
        self._crew: Crew | None = None

    @property
    def is_there(self) -> bool:
        """Whether there is a kernel at all."""
        return self._kernel is not None

    def prepare(self, like: Tensor) -> bool:
        """Compiles what such weights need; False where they are none of ours. Takes seconds without a cache."""
        if like.device.type == "cpu":
            self._kernel = compiled_linear(like.dtype)
            self._crew = crew_of(torch.get_num_threads()) if torch.get_num_threads() > 1 else None
        return self.is_there

    def drop(self) -> None:
        """Leaves everything to torch."""
        self.most_rows.clear()
        self._kernel = None

    def choose(self, weights: Sequence[Tensor], budget_seconds: float = BUDGET_SECONDS) -> None:
        """Measures for each shape among the weights up to how many rows the kernel is faster, within a budget."""
        if not self.is_there:
            return
        deadline = time.monotonic() + budget_seconds
        by_shape: dict[torch.Size, list[Tensor]] = {}
        for weight in weights:
            by_shape.setdefault(weight.shape, []).append(weight)
        won = dict.fromkeys(by_shape, 0)
        lost: set[torch.Size] = set()
        for count in ROW_COUNTS:
            for shape, alike in by_shape.items():
                if shape in lost:
                    continue
                is_faster = self._is_faster(count, alike, deadline)
                if is_faster is None:  # no time left
                    is_faster = count == 1 or (won[shape] > 0 and count <= ASSUMED_ROWS)
                if is_faster:
                    won[shape] = count
                else:
                    lost.add(shape)
        self.most_rows = won

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """x [n, K] times weight [N, K], plus bias -> [n, N], by whichever is faster."""
        if 0 < x.shape[0] <= self.most_rows.get(weight.shape, 0):
            return self.by_kernel(x, weight, bias)
        return functional.linear(x, weight, bias)

    def by_kernel(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """The same by the kernel. Sums are float32, rounded once.

        A number differs from the true sum by at most half a unit in its last place, plus K 2^-24 times the sum of the
        products' sizes; it has the same bits whatever other rows there are, and for any number of threads.
        """
        assert self._kernel is not None and weight.stride() == (weight.shape[1], 1)
        x = x.contiguous()
        num_rows, (num_outputs, length) = x.shape[0], weight.shape
        out = x.new_empty((num_rows, num_outputs))
        if num_rows == 0:
            return out
        addresses = (weight.data_ptr(), 0 if bias is None else bias.data_ptr(), x.data_ptr(), out.data_ptr())
        if self._crew is None or num_outputs * length * weight.element_size() < FEWEST_SHARED_BYTES:
            self._kernel(*addresses, 0, num_outputs, num_outputs, length, num_rows)
            return out
        kernel, size = self._kernel, -(-num_outputs // (CHUNKS_PER_THREAD * self._crew.num_threads))

        def chunk(number: int) -> None:
            start = number * size
            kernel(*addresses, start, min(start + size, num_outputs), num_outputs, length, num_rows)

        self._crew.run(chunk, -(-num_outputs // size))
        return out

    def _is_faster(self, count: int, alike: Sequence[Tensor], deadline: float) -> bool | None:
        """Each call takes the next of the weights: in a forward they are not in the nearest caches either."""
        rows = alike[0].new_ones((count, alike[0].shape[1]))
        clock, next_weight = measuring_clock(), itertools.cycle(alike)
        seconds: dict[bool, float] = {True: float("inf"), False: float("inf")}
        for attempt in range(1 + _TIMES):
            for is_ours in (True, False):
                if time.monotonic() > deadline:
                    return None
                weight = next(next_weight)
                started = clock()
                if is_ours:
                    self.by_kernel(rows, weight)
                else:
                    functional.linear(rows, weight)
                if attempt:
                    seconds[is_ours] = min(seconds[is_ours], clock() - started)
        return seconds[True] < (CLEARLY if are_trusted(count, alike[0]) else _WORTH) * seconds[False]
