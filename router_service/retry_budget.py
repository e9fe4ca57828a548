"""How often what failed is tried again: a token bucket, so that a sick expert is not stormed. Pure."""

from __future__ import annotations

from dataclasses import dataclass

RETRIES_PER_SECOND = 10.0
BURST = 30.0
MOST_OWED = 20.0
"""Nobody waits longer than it takes to earn these: what was sick may be back long before."""


@dataclass(slots=True)
class RetryBudget:
    """Of all sessions that one router has with one slot.

    Attributes:
        per_second: retries that it earns.
        burst: most that it saves up.
    """

    per_second: float = RETRIES_PER_SECOND
    burst: float = BURST
    _saved: float | None = None
    _seen_at: float = 0.0

    def take(self, now: float) -> float:
        """Takes one retry and returns how many seconds to wait for it: 0 while there are savings.

        Retries that have to wait stand in line, one after the other, up to `MOST_OWED`.

        Args:
            now: seconds of time.monotonic().
        """
        saved = self.burst if self._saved is None else self._saved
        saved = min(self.burst, saved + max(0.0, now - self._seen_at) * self.per_second)
        self._saved, self._seen_at = max(saved - 1.0, -MOST_OWED), now
        return max(0.0, -self._saved / self.per_second)
