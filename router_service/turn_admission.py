"""Which turns may begin: so many at a time, and no more key-value memory than there is.

    check() -> cheap, before anything is read or encoded
    reserve(tokens of the whole turn) -> Reservation, held until the turn's task has ended

Refusing is bookkeeping only, so that a router with far too much to do still says no within a millisecond.
"""

from __future__ import annotations

import math
import random
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Self

from fusionroute.errors import InvalidRequest, OutOfRoom, Reason
from router_service.token_pace import PaceLimit

SHORTEST_RETRY_SECONDS = 0.1
LONGEST_RETRY_SECONDS = 10.0
USUAL_RETRY_SECONDS = 0.5
"""Told while no turn has ended yet from which a rate could be known."""
RATE_WINDOW_SECONDS = 30.0
MOST_ENDS = 64


@dataclass(frozen=True, slots=True)
class KvBudget:
    """Key-value memory that all turns together may count on.

    Attributes:
        tokens: of all sessions in the model that has least.
        longest_turn: tokens that fit into one instance.
    """

    tokens: int
    longest_turn: int


@dataclass(slots=True, eq=False)
class TurnAdmission:
    """The turns of one router process that run, and whether another one may.

    Attributes:
        max_running: turns written at a time.
        budget: asked at every reservation, since experts come and go.
        pace: the limit that follows the latency of tokens; None = there is none.
    """

    max_running: int
    budget: Callable[[], KvBudget]
    pace: PaceLimit | None = None
    clock: Callable[[], float] = time.monotonic
    jitter: Callable[[], float] = random.random
    num_running: int = 0
    tokens_reserved: int = 0
    num_refused: int = 0
    _ends: deque[float] = field(default_factory=lambda: deque(maxlen=MOST_ENDS))
    _refused_since_end: int = 0

    def check(self) -> None:
        """Whether one more turn may run, whatever its length. Costs nothing; ask it before reading a request's text.

        Raises:
            OutOfRoom: QUEUE_FULL, with the time after which trying again makes sense.
        """
        limit = self.limit
        if self.num_running >= limit:
            raise self._refusal(
                Reason.QUEUE_FULL, f"{self.num_running} turns are running, the limit is {limit}", 1
            )

    def reserve(self, num_tokens: int) -> Reservation:
        """Counts a turn as running until its reservation is released.

        Args:
            num_tokens: the session at the longest that the turn can make it.

        Raises:
            InvalidRequest: CONTEXT_FULL, the turn would not fit even if it were alone.
            OutOfRoom: QUEUE_FULL or KV_MEMORY_FULL, with the time after which trying again makes sense.
        """
        budget = self.budget()
        if num_tokens > budget.longest_turn:
            raise InvalidRequest(
                Reason.CONTEXT_FULL,
                f"the session, the prompt and max_tokens are {num_tokens} tokens; the longest turn for which there is"
                f" key-value memory is {budget.longest_turn} tokens",
                metadata={"field": "max_tokens", "limit": str(budget.longest_turn)},
            )
        self.check()
        missing = self.tokens_reserved + num_tokens - budget.tokens
        if self.num_running and missing > 0:
            mean_tokens = max(1.0, self.tokens_reserved / self.num_running)
            raise self._refusal(
                Reason.KV_MEMORY_FULL,
                f"running turns hold {self.tokens_reserved} tokens of key-value memory; {num_tokens} more do not fit"
                f" into {budget.tokens}",
                math.ceil(missing / mean_tokens),
            )
        self.num_running += 1
        self.tokens_reserved += num_tokens
        return Reservation(self, num_tokens)

    @property
    def limit(self) -> int:
        """Turns that may run now."""
        return self.max_running if self.pace is None else min(self.max_running, self.pace.limit)

    def _refusal(self, reason: Reason, message: str, num_ends: int) -> OutOfRoom:
        """An error whose hint is when `num_ends` turns more will have ended, those refused before having had theirs."""
        wait = USUAL_RETRY_SECONDS
        seconds_per_end = self._seconds_per_end()
        if seconds_per_end is not None:
            wait = (num_ends + self._refused_since_end) * seconds_per_end
        self.num_refused += 1
        self._refused_since_end += 1
        wait *= 0.75 + 0.5 * self.jitter()  # all that are refused at once should not come back at once
        wait = min(max(wait, SHORTEST_RETRY_SECONDS), LONGEST_RETRY_SECONDS)
        return OutOfRoom(reason, message, retry_after_seconds=round(wait, 3))

    def _seconds_per_end(self) -> float | None:
        """Of late; None when too few turns have ended to know."""
        now = self.clock()
        while self._ends and self._ends[0] < now - RATE_WINDOW_SECONDS:
            self._ends.popleft()
        return (now - self._ends[0]) / len(self._ends) if self._ends and now > self._ends[0] else None

    def _ended(self, num_tokens: int) -> None:
        self.num_running -= 1
        self.tokens_reserved -= num_tokens
        self._ends.append(self.clock())
        self._refused_since_end //= 2


@dataclass(slots=True, eq=False)
class Reservation:
    """A turn that runs. `release` it when the turn's task has ended, however it ended.

    As a context manager it releases itself at the end, unless it was handed over to a task that will.
    """

    admission: TurnAdmission
    num_tokens: int
    _is_held: bool = True
    _is_handed_over: bool = False
    _last_token: float | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        if not self._is_handed_over:
            self.release()

    def hand_over(self) -> None:
        """From now on the turn's task releases it."""
        self._is_handed_over = True

    def token_written(self) -> None:
        """A token of the turn has come out; the time since the one before it is its latency."""
        pace, now = self.admission.pace, self.admission.clock()
        if pace is not None and self._last_token is not None:
            pace.observe(now - self._last_token, self.admission.num_running)
        self._last_token = now

    def release(self) -> None:
        """Gives the room back; a second time it does nothing."""
        if self._is_held:
            self._is_held = False
            self.admission._ended(self.num_tokens)
