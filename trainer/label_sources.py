"""What can be asked for labels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np

from fusionroute.errors import InvalidRequest, Reason
from fusionroute.router_model import ExpertRecord
from trainer.label_store import LabelStore, Span
from trainer.pace import Pace
from trainer.rows import RowSet
from trainer.run_context import Stop

Pending = Mapping[str, Sequence[Span]]


class LabelSource(Protocol):
    """Experts that give labels."""

    def find_experts(self, stop: Stop) -> tuple[ExpertRecord, ...]:
        """Who they are, in order. Raises FusionRouteError where one is missing or has another vocabulary."""

    def label(self, rows: RowSet, pending: Pending, store: LabelStore, pace: Pace, stop: Stop) -> None:
        """Asks each expert about the spans that it has not labelled yet, and puts the answers into the store."""


def check_context(rows: RowSet, slot: str, max_context_tokens: int) -> None:
    """Raises InvalidRequest (CONTEXT_FULL) where a row is longer than an expert can read.

    A row's last token is only asked about, not read.
    """
    longest = int(np.max(rows.lengths, initial=0)) - 1
    if longest > max_context_tokens:
        raise InvalidRequest(
            Reason.CONTEXT_FULL,
            f"the longest row has {longest + 1} tokens, the context of expert {slot!r} is {max_context_tokens}; "
            "set max_tokens of the data",
            metadata={"field": "max_tokens", "limit": str(max_context_tokens)},
        )
