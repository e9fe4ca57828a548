"""Whether it pays to wait a moment before a forward, because sessions that stepped just now will step again.

A forward of n tokens takes about a + b n seconds. With r steps ready, one begun at once gives r / (a + b r) tokens per
second; one that waits w seconds for k more gives (r + k) / (w + a + b (r + k)). The best of these is done. So a session
alone is never kept waiting, nor anybody for longer than a forward's fixed part a; and sessions that have come together
stay together, as all are answered at the same moment.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from fusionroute.lone_caller import LoneCaller

SMOOTHING = 0.2
FORGETTING = 0.98
"""Weight of what is known of forwards beside the next one."""
MOST_TOKENS = 64
"""Forwards of more tokens say nothing of those of decoding sessions."""
FEWEST_FORWARDS = 8.0
"""Before so many a forward's time says more about the machine waking up than about the model."""
LEAST_SECONDS = 5e-5
"""A thread does not wake more precisely."""
GONE_SECONDS = 30.0
RECENT_SECONDS = 1.0
"""Sessions that were heard of later than that take part in what is going on."""
FEWEST_GROUPED = 4
CROWDED = 1.35
"""Forwards that take so much longer than their processor time: others want the same processors."""
LEAST_GAIN = 1.05
"""By so much more must a wait give, as it is a guess."""
_LIKELY_SHARE = 0.7
"""Fixed part of a forward, as long as nothing else is known: forwards of about the same size say little about it."""
_DOUBT = 16.0
"""How much the numbers of tokens must vary (their variance) to say as much as that guess."""


@dataclass(slots=True)
class ForwardCost:
    """Learns a and b of forwards of few tokens, by least squares in which older ones fade."""

    _weight: float = 0.0
    _tokens: float = 0.0
    _seconds: float = 0.0
    _squares: float = 0.0
    _products: float = 0.0

    def took(self, num_tokens: int, seconds: float) -> None:
        """Hears of a forward."""
        if num_tokens > MOST_TOKENS:
            return
        self._weight = self._weight * FORGETTING + 1.0
        self._tokens = self._tokens * FORGETTING + num_tokens
        self._seconds = self._seconds * FORGETTING + seconds
        self._squares = self._squares * FORGETTING + num_tokens * num_tokens
        self._products = self._products * FORGETTING + num_tokens * seconds

    def line(self) -> tuple[float, float]:
        """Seconds of a forward without tokens, and per token."""
        if not self._weight:
            return 0.0, 0.0
        mean_tokens, mean_seconds = self._tokens / self._weight, self._seconds / self._weight
        variance = self._squares / self._weight - mean_tokens**2
        covariance = self._products / self._weight - mean_tokens * mean_seconds
        guess = (1.0 - _LIKELY_SHARE) * mean_seconds / mean_tokens
        slope = (covariance + _DOUBT * guess) / (variance + _DOUBT)
        slope = min(max(slope, 0.0), mean_seconds / mean_tokens)
        return mean_seconds - slope * mean_tokens, slope

    def seconds(self, num_tokens: int) -> float:
        """Of a forward of so many tokens; infinite while few have been heard of."""
        if self._weight < FEWEST_FORWARDS:
            return math.inf
        fixed, per_token = self.line()
        return fixed + per_token * num_tokens


@dataclass(slots=True)
class _Rhythm:
    """When a session steps again after an answer."""

    answered: float | None = None
    gap: float | None = None
    deviation: float = 0.0
    heard: float = 0.0

    def expected(self) -> float | None:
        """The time by which its next step has very likely come."""
        if self.answered is None or self.gap is None:
            return None
        return self.answered + self.gap + self.deviation


@dataclass(slots=True)
class Expectation:
    """Which sessions will step again soon.

    Attributes:
        cost: of forwards.
        confidence: how often steps come when they are expected, 0 to 1.
        lone: whose short steps were the only ones for a while.
        in_groups: whether they may go in two groups.
        crowding: seconds that a forward takes for each of processor time.
        group_size: of how many sessions a forward should be, so that others can be elsewhere meanwhile; None = of all.
    """

    cost: ForwardCost = field(default_factory=ForwardCost)
    confidence: float = 1.0
    _rhythms: dict[str, _Rhythm] = field(default_factory=dict)
    lone: LoneCaller = field(default_factory=LoneCaller)
    in_groups: bool = False
    crowding: float = 1.0
    group_size: int | None = None

    def stepped(self, session_id: str, now: float) -> None:
        """A short step of a session has come."""
        self.lone.came(session_id)
        rhythm = self._rhythms.setdefault(session_id, _Rhythm())
        rhythm.heard = now
        if rhythm.answered is None:
            return
        gap, expected = now - rhythm.answered, rhythm.expected()
        rhythm.answered = None
        if rhythm.gap is None:
            rhythm.gap, rhythm.deviation = gap, gap / 2
            return
        if expected is not None:
            self._learn(now <= expected)
        rhythm.deviation += SMOOTHING * (abs(gap - rhythm.gap) - rhythm.deviation)
        rhythm.gap += SMOOTHING * (gap - rhythm.gap)

    def answered(self, session_id: str, now: float) -> None:
        """A short step of a session was answered."""
        if (rhythm := self._rhythms.get(session_id)) is not None:
            rhythm.answered = rhythm.heard = now

    def forget(self, session_id: str) -> None:
        """A session is no more."""
        self._rhythms.pop(session_id, None)

    def wait_seconds(self, num_ready: int, now: float) -> float:
        """How long to wait for more steps; 0 = begin at once."""
        if len(self._rhythms) < 2:
            return 0.0
        fixed, per_token = self.cost.line()
        if self.group_size is not None:
            if num_ready >= self.group_size:
                return 0.0
            if self.is_crowded:
                return fixed
        best, best_wait = LEAST_GAIN * num_ready / max(fixed + per_token * num_ready, 1e-9), 0.0
        for count, wait in enumerate(self._waits(now, fixed), start=1):
            num_tokens = num_ready + count * self.confidence
            rate = num_tokens / (wait + fixed + per_token * num_tokens)
            if rate > best:
                best, best_wait = rate, wait
        return best_wait if best_wait > LEAST_SECONDS else 0.0

    def computed(self, num_tokens: int, seconds: float, processor_seconds: float, now: float) -> None:
        """Hears of a forward; `processor_seconds` of its thread, or `seconds` where those say nothing."""
        self.cost.took(num_tokens, seconds)
        if self.in_groups:
            if processor_seconds > 0.0:
                self.crowding += SMOOTHING * (seconds / processor_seconds - self.crowding)
            self._form_groups(now)

    def _form_groups(self, now: float) -> None:
        """Sets `group_size`.

        N sessions that go to and fro together between here and elsewhere take a + b N and then a gap g for a token of
        each; in two groups they take the longer of 2 (a + b N / 2), where forwards follow each other, and
        a + b N / 2 + g, where there are pauses between.
        """
        gaps = sorted(
            rhythm.gap
            for rhythm in self._rhythms.values()
            if rhythm.gap is not None and now - rhythm.heard < RECENT_SECONDS
        )
        if len(gaps) < FEWEST_GROUPED:
            self.group_size = None
            return
        (fixed, per_token), gap = self.cost.line(), gaps[len(gaps) // 2]
        half = -(-len(gaps) // 2)
        of_half = fixed + per_token * half
        together = fixed + per_token * len(gaps) + gap
        is_better = together > LEAST_GAIN * max(2 * of_half, of_half + gap)
        self.group_size = half if is_better else None

    @property
    def is_crowded(self) -> bool:
        """Whether a forward for few would only take the processor from those whom they could wait for."""
        return self.group_size is not None and self.crowding > CROWDED

    def waited_in_vain(self, *, others_came: bool = False) -> None:
        """Nobody came in the time that was given, or nobody else."""
        if not self.is_crowded:
            self._learn(False)
        elif not others_came:
            self.crowding = 1.0  # it was not for want of processors; the next forwards tell again

    def _waits(self, now: float, longest: float) -> list[float]:
        """Seconds until each of the sessions that are due has come, ascending."""
        waits: list[float] = []
        gone: list[str] = []
        for session_id, rhythm in self._rhythms.items():
            expected = rhythm.expected()
            if expected is None:
                continue
            if now < expected < now + longest:
                waits.append(expected - now)
            elif now - expected > GONE_SECONDS:
                gone.append(session_id)
        for session_id in gone:
            del self._rhythms[session_id]
        return sorted(waits)

    def _learn(self, came: bool) -> None:
        self.confidence += 0.05 * (came - self.confidence)
