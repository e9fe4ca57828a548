"""The processes of one data-parallel run, agreeing on small numbers without waiting for the accelerator."""

from __future__ import annotations

from datetime import timedelta

import torch
from torch import Tensor, distributed

TIMEOUT = timedelta(minutes=30)
"""Longest wait for the others; one of them may write a large state meanwhile."""


class ProcessGroup:
    """This process among its peers; alone, nothing is sent.

    Numbers travel over gloo from the CPU, whatever carries the gradients, so that agreeing stalls no device queue.
    """

    def __init__(self) -> None:
        self._group = None
        self.rank, self.world_size = 0, 1
        if distributed.is_available() and distributed.is_initialized():
            self.rank, self.world_size = distributed.get_rank(), distributed.get_world_size()
            self._group = distributed.new_group(backend="gloo", timeout=TIMEOUT)

    @property
    def is_first(self) -> bool:
        """Whether this process speaks for all: it writes, logs and reports."""
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """Element by element over all processes, on the CPU."""
        return self._reduced(values, distributed.ReduceOp.SUM)

    def smallest(self, values: Tensor) -> Tensor:
        """Element by element over all processes, on the CPU."""
        return self._reduced(values, distributed.ReduceOp.MIN)

    def largest(self, value: int) -> int:
        """The largest of all processes' numbers."""
        if self._group is None:
            return value
        return int(self._reduced(torch.tensor([value]), distributed.ReduceOp.MAX).item())

    def wait_for_all(self) -> None:
        """Returns when every process has come here."""
        self.largest(0)

    def _reduced(self, values: Tensor, operation: distributed.ReduceOp.RedOpType) -> Tensor:
        values = values.detach().cpu().clone()
        if self._group is not None:
            distributed.all_reduce(values, op=operation, group=self._group)
        return values
