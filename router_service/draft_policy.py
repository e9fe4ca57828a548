"""Whether drafting pays, and whose: decided for each round from what tokens and rounds have cost and what came true.

What a drafter would have proposed is compared with every token that is written without it, which costs no forward: so
its acceptance is known before it is ever used. What a round costs is learnt from rounds, all turns together; before
the first one it is estimated from the parts of a plain token. A round is drafted only where the tokens it is expected
to give are cheaper than plain ones, and only while drafting has not lost more than a small share of all time.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from router_service.drafting import EARLY, PLAIN, Drafter, DraftingMode, Lookup, Plan

LENGTHS = (2, 4, 8)
DRAFT_PROBABILITY = 0.4
"""A model's greedy token that it gives less than this is seldom the right one, and ends its draft. A sampled one may
well be: the noise by which it was chosen is that of the right one."""
FORCED_TOKENS = 4
"""Tokens of a draft that an application has asked for."""
MARGIN = 1.05
"""A draft must promise to be so much faster; below, the noise of the clock decides."""
LOSS_SHARE = 0.01
"""Of all time; what drafting may have lost before it rests. Rounds count with what such rounds take on average: the
hiccups of a machine are not the drafts' fault."""
GRACE_TOKENS = 2.0
"""Plain tokens' worth of time that drafting may lose before there is any share to speak of."""
FORGET = 0.1
"""Weight of the newest measurement."""
STALE_SECONDS = 60.0
"""After so long without a try, a round's cost is what it is estimated to be, not what it once was."""
FEWEST_SEEN = 8
"""Tokens of a turn before its drafts are judged, where no earlier turn has seen what such drafts are worth."""
WELL_KNOWN = 64.0
"""Tokens after which it is known, of all turns together, how often a drafter is right."""
LOOKUP_COST = 0.04
"""Estimate: what checking one more token adds, in plain tokens."""


@dataclass(slots=True)
class Average:
    """An exponentially weighted mean."""

    value: float = 0.0
    weight: float = 0.0
    at: float = 0.0

    def note(self, value: float, forget: float = FORGET) -> None:
        """Takes in a measurement."""
        self.at = time.monotonic()
        # The first ones count as an ordinary mean.
        share = max(forget, 1.0 / (self.weight + 1.0))
        self.value += share * (value - self.value)
        self.weight += 1.0

    def note_seconds(self, seconds: float) -> None:
        """Takes in a time; a hiccup counts as three times what is usual."""
        is_hiccup = self.weight > 0.0 and seconds > 3.0 * self.value > 0.0
        self.note(3.0 * self.value if is_hiccup else seconds)


@dataclass(slots=True)
class Trials:
    """Whether asking early pays: blocks of tokens with it and without it, the better one more often.

    Attributes:
        plain, early: seconds of a token.
    """

    plain: Average = field(default_factory=Average)
    early: Average = field(default_factory=Average)
    _left: int = 0
    _is_early: bool = False
    _rest_tokens: int = 64

    BLOCK_TOKENS = 4
    LONGEST_REST_TOKENS = 4096

    def choose(self) -> bool:
        """Whether the next token is asked early."""
        if self._left <= 0:
            self._next_block()
        self._left -= 1
        return self._is_early

    def note(self, seconds: float, *, early: bool) -> None:
        """Hears what a token took."""
        (self.early if early else self.plain).note_seconds(seconds)

    def _next_block(self) -> None:
        if min(self.plain.weight, self.early.weight) < 2 * self.BLOCK_TOKENS:
            self._is_early = self.early.weight < self.plain.weight
            self._left = self.BLOCK_TOKENS
            return
        better_early = self.early.value < self.plain.value
        if self._is_early == better_early:  # the other one is tried again, ever more rarely if it is always worse
            self._is_early = not better_early
            self._left = self.BLOCK_TOKENS
        else:
            self._is_early = better_early
            self._rest_tokens = min(2 * self._rest_tokens, self.LONGEST_REST_TOKENS)
            self._left = self._rest_tokens


@dataclass(slots=True)
class RoundCost:
    """What rounds with a draft of some length have taken, and how long their drafts really were."""

    seconds: Average = field(default_factory=Average)
    num_drafted: Average = field(default_factory=Average)


@dataclass(slots=True)
class Experience:
    """What all turns under one checkpoint have learnt.

    Attributes:
        up_to_turns: with more turns than these at a time nothing is drafted or asked early: their tokens already share
            forwards, and a draft would take from the others what it gives to its own.
        num_turns: that are written now.
        token_seconds: of a token without a draft.
        router_seconds, expert_seconds: of its forwards, where the expert was asked after the router.
        acceptance: probability that the next token of a drafter is the right one.
    """

    up_to_turns: int = 4
    num_turns: int = 0
    token_seconds: Average = field(default_factory=Average)
    router_seconds: Average = field(default_factory=Average)
    expert_seconds: Average = field(default_factory=Average)
    trials: Trials = field(default_factory=Trials)
    acceptance: dict[Drafter, Average] = field(default_factory=lambda: {each: Average() for each in Drafter})
    _rounds: dict[tuple[Drafter, int], RoundCost] = field(default_factory=dict)
    _all_seconds: float = 0.0
    _lost_seconds: float = 0.0

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

    def note_token(self, plan: Plan, seconds: float, router_seconds: float, expert_seconds: float) -> None:
        """Hears what a token without draft took, and its forwards."""
        self._all_seconds += seconds
        self.trials.note(seconds, early=plan.early)
        self.token_seconds.note_seconds(seconds)
        if not plan.early:
            self.router_seconds.note_seconds(router_seconds)
            self.expert_seconds.note_seconds(expert_seconds)

    def note_round(
        self, plan: Plan, num_drafted: int, num_tokens: int, seconds: float, *, was_asked_for: bool = False
    ) -> None:
        """Hears what a round with a draft took, and how many tokens it gave.

        Args:
            was_asked_for: by the application; what it has lost then is not the policy's loss.
        """
        assert plan.drafter is not None
        cost = self._rounds.setdefault((plan.drafter, plan.num_tokens), RoundCost())
        cost.seconds.note_seconds(seconds)
        cost.num_drafted.note(num_drafted)
        self._all_seconds += seconds
        if was_asked_for:
            return
        lost = self._lost_seconds + cost.seconds.value - num_tokens * self.token_seconds.value
        self._lost_seconds = max(lost, -LOSS_SHARE * self._all_seconds)  # what was gained is not all to be lost again

    def speed_up(self, drafter: Drafter, num_tokens: int, acceptance: float) -> float:
        """Time of plain tokens / time of a round that gives as many, as expected."""
        seconds, num_drafted = self._cost(drafter, num_tokens)
        if acceptance >= 1.0:
            given = num_drafted + 1.0
        else:
            given = (1.0 - acceptance ** (num_drafted + 1.0)) / (1.0 - acceptance)
        return given * self.token_seconds.value / max(seconds, 1e-9)

    def can_afford(self, drafter: Drafter, num_tokens: int) -> bool:
        """Whether a round may fail entirely."""
        plain = self.token_seconds.value
        loss = max(0.0, self._cost(drafter, num_tokens)[0] - plain)
        return self._lost_seconds + loss <= LOSS_SHARE * self._all_seconds + GRACE_TOKENS * plain

    def _cost(self, drafter: Drafter, num_tokens: int) -> tuple[float, float]:
        """Seconds of a round, and how long its draft really is."""
        measured = self._rounds.get((drafter, num_tokens))
        if measured is not None and time.monotonic() - measured.seconds.at < STALE_SECONDS:
            return measured.seconds.value, measured.num_drafted.value
        plain = self.token_seconds.value
        more = {
            Drafter.ROUTER: self.router_seconds.value,
            Drafter.EXPERT: self.expert_seconds.value,
            Drafter.LOOKUP: plain * LOOKUP_COST,
        }
        return plain + num_tokens * more[drafter], float(num_tokens)


@dataclass(slots=True)
class TurnDrafting:
    """The decisions of one turn.

    Attributes:
        drafters: who could draft under the turn's rule.
        early: whether an expert may be asked early; None = where it pays.
        least_probability: models stop drafting before a token that they give less.
    """

    mode: DraftingMode
    drafters: Sequence[Drafter]
    experience: Experience
    lookup: Lookup
    early: bool | None = None
    least_probability: float = DRAFT_PROBABILITY
    num_seen: int = 0
    _acceptance: dict[Drafter, Average] = field(default_factory=dict)

    def __post_init__(self) -> None:
        # What earlier turns saw is where this one begins, and is outweighed soon.
        for drafter in self.drafters:
            before = self.experience.acceptance[drafter]
            self._acceptance[drafter] = Average(before.value, min(before.weight, 2.0))

    def plan(self, num_left: int, *, can_be_early: bool) -> Plan:
        """The next round.

        Args:
            num_left: tokens that the turn may still write; a draft is shorter than that.
            can_be_early: whether it is known whom to ask early, and whether they are there.
        """
        plan = self._drafted(num_left - 1, has_expert=can_be_early) if num_left > 1 else None
        if plan is not None:
            return plan
        if not can_be_early or self.early is False:
            return PLAIN
        if self.early or (self.experience.may_try and self.experience.trials.choose()):
            return EARLY
        return PLAIN

    @property
    def is_choosing(self) -> bool:
        """Whether it matters what drafters would propose."""
        return self.mode is DraftingMode.AUTO and self.experience.may_try

    @property
    def looks_at_guess(self) -> bool:
        """Whether it matters whom one would ask early."""
        if self.mode.drafter is not None or self.early:
            return True
        return self.experience.may_try and (self.mode is DraftingMode.AUTO or self.early is None)

    def _is_judged(self, drafter: Drafter) -> bool:
        return self.num_seen >= FEWEST_SEEN or self.experience.acceptance[drafter].weight >= WELL_KNOWN

    def acceptance(self, drafter: Drafter) -> float:
        """The probability that the next drafted token is the right one."""
        return self._acceptance[drafter].value

    def note_token(self, drafter: Drafter, *, was_right: bool) -> None:
        """Hears whether the next token that a drafter proposed, or would have proposed, was the right one."""
        self._acceptance[drafter].note(float(was_right))
        self.experience.acceptance[drafter].note(float(was_right), 0.02)

    def _drafted(self, most: int, *, has_expert: bool) -> Plan | None:
        forced = self.mode.drafter
        if forced is not None:
            if forced not in self.drafters or (forced is Drafter.EXPERT and not has_expert):
                return None
            return self._with(forced, min(FORCED_TOKENS, most), 0.0)
        if self.mode is DraftingMode.OFF or not self.experience.may_try:
            return None
        best, best_speed = None, MARGIN
        for drafter in self.drafters:
            if (drafter is Drafter.EXPERT and not has_expert) or not self._is_judged(drafter):
                continue
            for count in LENGTHS:
                speed = self.experience.speed_up(drafter, count, self.acceptance(drafter))
                if count <= most and speed > best_speed and self.experience.can_afford(drafter, count):
                    plan = self._with(drafter, count, self.least_probability)
                    if plan is not None:
                        best, best_speed = plan, speed
        return best

    def _with(self, drafter: Drafter, num_tokens: int, least_probability: float) -> Plan | None:
        if drafter is not Drafter.LOOKUP:
            return Plan(drafter, num_tokens, least_probability)
        ids = self.lookup.propose(num_tokens)
        return Plan(drafter, len(ids), ids=ids) if ids else None
