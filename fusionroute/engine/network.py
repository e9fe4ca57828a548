"""What computes: a causal LM as the engine sees it, whichever code runs its layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from fusionroute.engine.attention import RaggedBatch


class Network(Protocol):
    """Runs packed rows of tokens."""

    @property
    def can_be_exact(self) -> bool:
        """Whether it takes exact batches."""

    def run(
        self, batch: RaggedBatch, token_ids: Sequence[int], positions: Sequence[int], wanted: Sequence[int]
    ) -> tuple[Tensor, Tensor | None]:
        """Logits [wanted, width] and, unless nobody wants them, final hidden states [wanted, H], on its device."""
