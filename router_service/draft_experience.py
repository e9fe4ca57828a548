"""What all turns under one checkpoint have learnt of rounds: what they cost, by how many turns run, and what came true.

Turns that run together share forwards. So a round is judged by others that were made while about as many turns ran, and
whether drafting pays for all of them together is tried out: what one turn gains another one may lose.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from router_service.draft_trials import Trials
from router_service.drafting import Drafter, Plan

LOADS = (1, 4, 8, 16, 32, 64)
"""Rounds are kept apart by how many turns run: 1, up to 4, up to 8 ... and more than the last."""
LOSS_SHARE = 0.01
"""Of all time; what drafting may have lost before what is not known to pay rests. Rounds count with what such rounds
take on average: the hiccups of a machine are not the drafts' fault."""
GRACE_TOKENS = 2.0
"""Plain tokens' worth of time that drafting may lose before there is any share to speak of."""
FORGET = 0.1
"""Weight of the newest measurement."""
STALE_SECONDS = 60.0
"""After so long without a try, a round's cost is what it is estimated to be, not what it once was."""
SURE_ROUNDS = 4.0
"""After so many rounds it is known whether a drafter's drafts have paid."""
FRESH_ROUNDS = 48
"""Of so many rounds one is plain, so that drafts are compared with what a plain token takes now."""
LOOKUP_COST = 0.04
"""Estimate: what checking one more token adds, in plain tokens."""
CROWD_MARGIN = 1.02
"""By so much all turns together must be faster with drafts than without."""


@dataclass(slots=True)
class Average:
    """An exponentially weighted mean."""

    value: float = 0.0
    weight: float = 0.0

    def note(self, value: float, forget: float = FORGET) -> None:
        """Takes in a measurement."""
        # The first ones count as an ordinary mean.
        share = max(forget, 1.0 / (self.weight + 1.0))
        self.value += share * (value - self.value)
        self.weight += 1.0

    def note_seconds(self, seconds: float) -> None:
        """Takes in a time; a hiccup counts as three times what is usual."""
        is_hiccup = self.weight > 0.0 and seconds > 3.0 * self.value > 0.0
        self.note(3.0 * self.value if is_hiccup else seconds)


@dataclass(frozen=True, slots=True)
class Spent:
    """What a round took.

    Attributes:
        router_seconds, expert_seconds: within their forwards.
    """

    seconds: float
    router_seconds: float = 0.0
    expert_seconds: float = 0.0


@dataclass(slots=True)
class RoundCost:
    """What rounds with a draft of some length have taken, and how long their drafts really were."""

    seconds: Average = field(default_factory=Average)
    num_drafted: Average = field(default_factory=Average)
    noted_at: float = 0.0


@dataclass(slots=True)
class Load:
    """What rounds have taken while so many turns ran.

    Attributes:
        is_crowd: whether there are several, so that what one of them does is felt by others.
        token_seconds: of a token without a draft.
        router_seconds, expert_seconds: of its forwards, where the expert was asked after the router.
        early: whether asking early pays.
        drafts: in a crowd, whether it pays for all of them that those draft who gain by it.
        has_paid: by how many plain tokens a round of a drafter was ahead, on average.
    """

    clock: Callable[[], float]
    is_crowd: bool
    token_seconds: Average = field(default_factory=Average)
    router_seconds: Average = field(default_factory=Average)
    expert_seconds: Average = field(default_factory=Average)
    early: Trials = field(default_factory=Trials)
    drafts: Trials = field(
        default_factory=lambda: Trials(longest_rest_rounds=512, margin=CROWD_MARGIN, is_likely=True)
    )
    has_paid: dict[Drafter, Average] = field(default_factory=lambda: {each: Average() for each in Drafter})
    _rounds: dict[tuple[Drafter, int], RoundCost] = field(default_factory=dict)
    _num_since_plain: int = 0
    _used_at: float = 0.0

    def enter(self) -> None:
        """So many turns run now; what was found out long ago is tried again."""
        now = self.clock()
        if self._used_at and now - self._used_at > STALE_SECONDS:
            self.early.look_again()
            self.drafts.look_again()
        self._used_at = now

    @property
    def wants_plain(self) -> bool:
        """Whether it is time to see what a token takes without a draft."""
        return self._num_since_plain >= FRESH_ROUNDS and not self.is_crowd

    def note_plain(self, spent: Spent, *, was_early: bool, is_among_drafts: bool) -> None:
        """Hears what a token without draft took.

        Args:
            is_among_drafts: others draft, which made it slower than it would have been.
        """
        self._num_since_plain = 0
        if is_among_drafts and self.token_seconds.weight:
            return
        self.token_seconds.note_seconds(spent.seconds)
        if not was_early:
            self.router_seconds.note_seconds(spent.router_seconds)
            self.expert_seconds.note_seconds(spent.expert_seconds)

    def note_draft(self, plan: Plan, num_drafted: int, seconds: float) -> float:
        """Hears what a round with a draft took; says what such rounds take on average."""
        assert plan.drafter is not None
        self._num_since_plain += 1
        cost = self._rounds.setdefault((plan.drafter, plan.num_tokens), RoundCost())
        cost.seconds.note_seconds(seconds)
        cost.num_drafted.note(num_drafted)
        cost.noted_at = self.clock()
        return cost.seconds.value

    def speed_up(self, drafter: Drafter, num_tokens: int, acceptance: float) -> float:
        """Time of plain tokens / time of a round that gives as many, as expected."""
        seconds, num_drafted = self.cost(drafter, num_tokens)
        if acceptance >= 1.0:
            given = num_drafted + 1.0
        else:
            given = (1.0 - acceptance ** (num_drafted + 1.0)) / (1.0 - acceptance)
        return given * self.token_seconds.value / max(seconds, 1e-9)

    def cost(self, drafter: Drafter, num_tokens: int) -> tuple[float, float]:
        """Seconds of a round, and how long its draft really is."""
        measured = self._measured(drafter, num_tokens)
        if measured is not None:
            return measured.seconds.value, measured.num_drafted.value
        factor = 1.0  # by which rounds of other lengths have taken longer than was estimated
        for (other, length), cost in self._rounds.items():
            if other is drafter and self._measured(drafter, length) is not None:
                factor = max(factor, cost.seconds.value / self._estimate(drafter, cost.num_drafted.value))
        return factor * self._estimate(drafter, num_tokens), float(num_tokens)

    def _measured(self, drafter: Drafter, num_tokens: int) -> RoundCost | None:
        cost = self._rounds.get((drafter, num_tokens))
        return cost if cost is not None and self.clock() - cost.noted_at < STALE_SECONDS else None

    def _estimate(self, drafter: Drafter, num_tokens: float) -> float:
        """Seconds of a round from the parts of a plain token."""
        plain = self.token_seconds.value
        more = {
            Drafter.ROUTER: self.router_seconds.value,
            Drafter.EXPERT: self.expert_seconds.value,
            Drafter.LOOKUP: plain * LOOKUP_COST,
        }
        return max(plain + num_tokens * more[drafter], 1e-9)


@dataclass(slots=True)
class Budget:
    """How much of all time drafts may lose while it is not known that they pay."""

    all_seconds: float = 0.0
    lost_seconds: float = 0.0

    def note(self, seconds: float, lost_seconds: float) -> None:
        """Hears of a round, and by how much it was slower than plain tokens; below 0: faster."""
        self.all_seconds += seconds
        # What was gained is not all to be lost again.
        self.lost_seconds = max(self.lost_seconds + lost_seconds, -LOSS_SHARE * self.all_seconds)

    def allows(self, seconds: float, token_seconds: float) -> bool:
        """Whether so much more may be lost."""
        return self.lost_seconds + seconds <= LOSS_SHARE * self.all_seconds + GRACE_TOKENS * token_seconds


@dataclass(slots=True)
class Experience:
    """What all turns under one checkpoint have learnt.

    Attributes:
        up_to_turns: with more turns than these at a time nothing is drafted or asked early, whatever was measured.
        num_turns: that are written now.
        acceptance: probability that the next token of a drafter is the right one.
    """

    up_to_turns: int = 64
    clock: Callable[[], float] = time.monotonic
    num_turns: int = 0
    acceptance: dict[Drafter, Average] = field(default_factory=lambda: {each: Average() for each in Drafter})
    budget: Budget = field(default_factory=Budget)
    _loads: dict[int, Load] = field(default_factory=dict)

    @contextmanager
    def one_more_turn(self) -> Iterator[None]:
        """A turn is written within the context."""
        self.num_turns += 1
        try:
            yield
        finally:
            self.num_turns -= 1

    @property
    def may_try(self) -> bool:
        """Whether there is room for anything but plain tokens."""
        return self.num_turns <= self.up_to_turns

    @property
    def load(self) -> Load:
        """What is known of rounds while as many turns run as now."""
        place = bisect_left(LOADS, self.num_turns)
        if place not in self._loads:
            self._loads[place] = Load(self.clock, is_crowd=place > 0)
        return self._loads[place]

    def note_draft(
        self,
        load: Load,
        plan: Plan,
        num_drafted: int,
        num_tokens: int,
        seconds: float,
        *,
        was_asked_for: bool,
    ) -> None:
        """Hears what a round with a draft took, and how many tokens it gave.

        Args:
            was_asked_for: by the application; what it has lost then is not the policy's loss.
        """
        assert plan.drafter is not None
        usual = load.note_draft(plan, num_drafted, seconds)
        if was_asked_for:
            return
        plain = load.token_seconds.value
        self.budget.note(seconds, usual - num_tokens * plain)
        load.has_paid[plan.drafter].note(num_tokens - usual / plain)

    def can_afford(self, load: Load, drafter: Drafter, num_tokens: int) -> bool:
        """Whether a round may fail entirely: its drafter's have paid so far, or the budget has room for the loss."""
        paid = load.has_paid[drafter]
        if paid.weight >= SURE_ROUNDS and paid.value > 0.0:
            return True
        plain = load.token_seconds.value
        return self.budget.allows(max(0.0, load.cost(drafter, num_tokens)[0] - plain), plain)
