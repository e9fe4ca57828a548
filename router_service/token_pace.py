"""How many turns may run so that tokens keep coming fast enough: additive increase, multiplicative decrease.

    p95 of a round's latencies > wanted  ->  limit = 0.8 x the turns that ran
    p95 <= wanted, and the limit is used up  ->  limit + 1

A round is the latencies of one second, at least twenty of them.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

ROUND_SECONDS = 1.0
FEWEST_LATENCIES = 20
DECREASE = 0.8


@dataclass(slots=True, eq=False)
class PaceLimit:
    """The limit of running turns that keeps the 95th percentile of token latency below a wanted one.

    Attributes:
        max_token_seconds: the wanted percentile.
        most: turns that may run when all is well; where it begins.
    """

    max_token_seconds: float
    most: int
    clock: Callable[[], float] = time.monotonic
    limit: int = field(init=False)
    _latencies: list[float] = field(default_factory=list)
    _round_began: float = field(init=False)

    def __post_init__(self) -> None:
        self.limit = self.most
        self._round_began = self.clock()

    def observe(self, latency_seconds: float, num_running: int) -> None:
        """Hears of one token; at the end of a round the limit is judged anew.

        Args:
            latency_seconds: since the turn's previous token.
            num_running: turns that run now.
        """
        self._latencies.append(latency_seconds)
        now = self.clock()
        if now - self._round_began < ROUND_SECONDS or len(self._latencies) < FEWEST_LATENCIES:
            return
        if percentile(self._latencies, 0.95) > self.max_token_seconds:
            self.limit = max(1, int(min(self.limit, num_running) * DECREASE))
        elif num_running >= self.limit:
            self.limit = min(self.most, self.limit + 1)
        self._latencies.clear()
        self._round_began = now


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that is not below `share` of them; `values` must not be empty."""
    rank = math.ceil(share * len(values) - 1e-9)
    return sorted(values)[max(1, rank) - 1]
