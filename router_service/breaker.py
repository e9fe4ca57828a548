"""When to leave an instance alone that fails again and again. Pure: time comes in as an argument.

    closed --several faults in a row, or one silence--> open --pause over, knock answered--> half-open
      ^                                                  ^                                      |
      |                                                  +------------the probe failed----------+
      +------------------------------the probe succeeded----------------------------------------+

A knock is a call that costs no session anything, such as a health check: an instance that does not even answer that
is not tried with a session's step. Only faults of the server are told to a breaker, never what the caller did wrong.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

NUM_FAULTS = 3
"""So many in a row open it."""
FIRST_PAUSE_SECONDS = 0.2
LONGEST_PAUSE_SECONDS = 8.0


class BreakerState(Enum):
    """Whether an instance is asked."""

    CLOSED = "closed"
    """As usual."""
    OPEN = "open"
    """By nobody."""
    HALF_OPEN = "half_open"
    """By one caller, to see whether it works again."""


@dataclass(slots=True)
class Breaker:
    """Of one instance. Times are seconds of time.monotonic().

    Attributes:
        jitter: draws from [0, 1); pauses are between half and whole of their length, so that routers which lost the
            same instance do not come back to it at once.
    """

    jitter: Callable[[], float] = random.random
    state: BreakerState = BreakerState.CLOSED
    _num_faults: int = 0
    _num_openings: int = 0
    _knock_at: float = 0.0
    _is_knocking: bool = False
    _is_probing: bool = False

    def lets_in(self) -> bool:
        """Whether one more call may be made now."""
        return self.state is BreakerState.CLOSED or (
            self.state is BreakerState.HALF_OPEN and not self._is_probing
        )

    def begin(self) -> None:
        """A call is made; of a half-open one it is the probe."""
        if self.state is BreakerState.HALF_OPEN:
            self._is_probing = True

    def leave(self) -> None:
        """A call ended and says nothing about the server, such as one that was cancelled."""
        self._is_probing = False

    def succeed(self) -> bool:
        """The server did what it was asked. Returns whether that has closed the breaker."""
        if self._num_faults:
            was_closed = self.state is BreakerState.CLOSED
            self.state = BreakerState.CLOSED
            self._num_faults = self._num_openings = 0
            self._is_probing = False
            return not was_closed
        return False

    def fail(self, now: float, *, silent: bool = False) -> bool:
        """A fault of the server. Returns whether that has opened the breaker.

        Args:
            now: the time.
            silent: it did not answer at all; one such fault opens the breaker, as each costs its caller seconds.
        """
        self._is_probing = False
        self._num_faults += 1
        if self.state is BreakerState.OPEN:
            return False  # a call that began before it opened
        if silent or self.state is BreakerState.HALF_OPEN or self._num_faults >= NUM_FAULTS:
            self._open(now)
            return True
        return False

    def should_knock(self, now: float) -> bool:
        """Whether it is time to see if the server answers at all."""
        return self.state is BreakerState.OPEN and not self._is_knocking and now >= self._knock_at

    def knock(self) -> None:
        """Somebody knocks."""
        self._is_knocking = True

    def answered(self, now: float, *, well: bool) -> None:
        """What came of the knock."""
        self._is_knocking = False
        if self.state is not BreakerState.OPEN:
            return
        if well:
            self.state = BreakerState.HALF_OPEN
        else:
            self._open(now)

    def _open(self, now: float) -> None:
        pause = min(LONGEST_PAUSE_SECONDS, FIRST_PAUSE_SECONDS * 2.0 ** min(self._num_openings, 10))
        self.state = BreakerState.OPEN
        self._num_openings += 1
        self._knock_at = now + pause * (0.5 + 0.5 * self.jitter())
