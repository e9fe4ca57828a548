"""Two ways to do the same, a round with something or without it: which of them is faster is found out in passing."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from statistics import median

SEEN_TRIALS = 5
"""The newest ones decide, by their median: one hiccup of the machine decides nothing."""
SURE_TRIALS = 3
"""After so many the faster way is kept for longer and longer."""
CLEAR = 1.2
"""Two trials that both differ by so much will do."""
LIKELY = 0.9
"""What a trial is expected to show, where it is expected to show a gain."""
TRIAL_SHARE = 0.01
"""Of the time until the next trial, what the last one may have lost."""


@dataclass(slots=True)
class Trials:
    """Blocks of rounds of all turns together: the faster way goes on, the other is tried for a block ever more rarely.

    A trial is compared with the block just before it, so that what slows both down does not count.

    Attributes:
        block_rounds: of each turn.
        first_rest_rounds, longest_rest_rounds: of each turn, from one trial to the next; doubled while nothing changes.
        margin: by what factor the way with it must be faster to be kept.
        is_likely: whether it is expected to be faster, so that two trials have to say that it is not.
        is_on: whether rounds are made with it now.
        is_better: whether that has been found to be faster, or is expected.
    """

    block_rounds: int = 4
    first_rest_rounds: int = 64
    longest_rest_rounds: int = 4096
    margin: float = 1.0
    is_likely: bool = False
    is_on: bool = False
    is_better: bool = False
    _ratios: deque[float] = field(default_factory=lambda: deque(maxlen=SEEN_TRIALS))
    _rest_rounds: int = 0
    _num_left: int = -1
    _seconds: float = 0.0
    _num_tokens: int = 0
    _num_noted: int = 0
    _usual: float | None = None

    def __post_init__(self) -> None:
        self._expect()

    def choose(self, num_turns: int = 1) -> bool:
        """Whether the next round is made with it.

        Args:
            num_turns: whose rounds make up a block.
        """
        if self._num_left < 0:
            self._begin(is_on=False, num_rounds=self.block_rounds * num_turns)
        elif self._num_left == 0:
            self._end_block(num_turns)
        self._num_left -= 1
        return self.is_on

    def note(self, seconds: float, num_tokens: int, *, was_on: bool, num_turns: int = 1) -> None:
        """Hears what a round took, and how many tokens it gave."""
        if was_on is not self.is_on:
            return  # begun in the block before
        self._num_noted += 1
        if self._num_noted <= num_turns and num_turns > 1:
            return  # it ran beside rounds of the block before
        self._seconds += seconds
        self._num_tokens += num_tokens
        if not self._is_trial and self._num_noted >= self.block_rounds * num_turns:
            self._usual = self._seconds / self._num_tokens
            self._forget_block()

    def look_again(self) -> None:
        """What was found out may no longer hold: it is tried as soon as at first."""
        self._rest_rounds = 0
        self._expect()
        self._num_left = min(self._num_left, self.block_rounds)

    def _expect(self) -> None:
        self._ratios.clear()
        self.is_better = self.is_better or self.is_likely

    def _is_on_faster(self) -> bool:
        """What trials have shown, and what is expected while they are few."""
        expected = [LIKELY] * (SURE_TRIALS - len(self._ratios)) if self.is_likely else []
        return median([*self._ratios, *expected]) * self.margin < 1.0

    @property
    def _is_trial(self) -> bool:
        return self.is_on is not self.is_better

    def _end_block(self, num_turns: int) -> None:
        block = self.block_rounds * num_turns
        if not self._is_trial:
            if self._usual is None:  # too few rounds were noted to compare a trial with
                self._num_left = block
            else:
                self._begin(is_on=not self.is_on, num_rounds=block)
            return
        if self._num_tokens and self._usual:
            tried = self._seconds / self._num_tokens
            self._ratios.append(tried / self._usual if self.is_on else self._usual / tried)
            was_better, self.is_better = self.is_better, self._is_on_faster()
            self._rest_rounds = self._next_rest(
                tried / self._usual - 1.0, has_changed=was_better is not self.is_better
            )
        self._begin(is_on=self.is_better, num_rounds=max(self._rest_rounds, self.block_rounds) * num_turns)

    def _next_rest(self, lost: float, *, has_changed: bool) -> int:
        """Rounds until the next trial: so many that trials like the last one, which lost this share, cost little."""
        fair = int(self.block_rounds * max(0.0, lost) / TRIAL_SHARE)
        is_clear = len(self._ratios) > 1 and (min(self._ratios) > CLEAR or max(self._ratios) < 1.0 / CLEAR)
        if has_changed or not (is_clear or len(self._ratios) >= SURE_TRIALS):
            return min(fair, 2 * self.first_rest_rounds)
        return min(max(fair, 2 * self._rest_rounds, self.first_rest_rounds), self.longest_rest_rounds)

    def _begin(self, *, is_on: bool, num_rounds: int) -> None:
        self.is_on, self._num_left = is_on, num_rounds
        if not self._is_trial:
            self._usual = None
        self._forget_block()

    def _forget_block(self) -> None:
        self._seconds, self._num_tokens, self._num_noted = 0.0, 0, 0
