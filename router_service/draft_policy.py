"""Whether drafting pays, and whose: decided for each round from what tokens and rounds have cost and what came true.

What a drafter would have proposed is compared with tokens that are written without it, which costs no forward: so its
acceptance is known before it is ever used. What a round costs is learnt from rounds, all turns together; before
the first one it is estimated from the parts of a plain token. A round is drafted only where the tokens it is expected
to give are cheaper than plain ones, only while such drafts have paid or drafting has not lost more than a small share
of all time, and where several turns run, only if all of them together are faster for it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from router_service.draft_experience import Average, Experience, Load, Spent
from router_service.drafting import EARLY, PLAIN, Drafter, DraftingMode, Lookup, Plan, before_end

LENGTHS = (2, 4, 8)
DRAFT_PROBABILITY = 0.4
"""A model's greedy token that it gives less than this is seldom the right one, and ends its draft. A sampled one may
well be: the noise by which it was chosen is that of the right one."""
FORCED_TOKENS = 4
"""Tokens of a draft that an application has asked for."""
MARGIN = 1.05
"""A draft must promise to be so much faster; below, the noise of the clock decides."""
FEWEST_SEEN = 8
"""Tokens of a turn before its drafts are judged, where no earlier turn has seen what such drafts are worth."""
WELL_KNOWN = 64.0
"""Tokens after which it is known, of all turns together, how often a drafter is right."""


@dataclass(slots=True)
class TurnDrafting:
    """The decisions of one turn.

    Attributes:
        drafters: who could draft under the turn's rule.
        early: whether an expert may be asked early; None = where it pays.
        least_probability: models stop drafting before a token that they give less.
        end_ids: nothing may follow these: a draft ends before them.
        is_apart: its drafts are not worth what those of other turns are: drafters do not know what may not be written.
    """

    mode: DraftingMode
    drafters: Sequence[Drafter]
    experience: Experience
    lookup: Lookup
    early: bool | None = None
    least_probability: float = DRAFT_PROBABILITY
    end_ids: frozenset[int] = frozenset()
    is_apart: bool = False
    num_seen: int = 0
    _acceptance: dict[Drafter, Average] = field(default_factory=dict)
    _load: Load = field(init=False)
    _may_draft: bool = False
    _is_early_tried: bool = False

    def __post_init__(self) -> None:
        self._load = self.experience.load
        # What earlier turns saw is where this one begins, and is outweighed soon.
        for drafter in self.drafters:
            before = Average() if self.is_apart else self.experience.acceptance[drafter]
            self._acceptance[drafter] = Average(before.value, min(before.weight, 2.0))

    def plan(self, num_left: int, can_be_early: Callable[[], bool]) -> Plan:
        """The next round.

        Args:
            num_left: tokens that the turn may still write; a draft is shorter than that.
            can_be_early: says whether it is known whom to ask early, and whether they are there; asked only where
                that matters, as it takes a look at every instance of a slot.
        """
        self._load = self.experience.load
        self._load.enter()
        self._may_draft = self._is_drafting_allowed()
        self._is_early_tried = False
        plan = self._drafted(num_left - 1, can_be_early) if num_left > 1 else None
        if plan is not None:
            return plan
        return EARLY if self._is_early() and can_be_early() else PLAIN

    def note_round(self, plan: Plan, num_drafted: int, num_tokens: int, spent: Spent) -> None:
        """Hears what the round of a plan took.

        Args:
            num_drafted: tokens that were proposed; 0 also where a drafter had nothing to propose.
            num_tokens: that the round gave.
        """
        load, experience = self._load, self.experience
        if load is not experience.load:
            return  # turns have begun or ended meanwhile: it says nothing about either load
        is_choosing = self.is_choosing
        in_crowd = load.is_crowd and is_choosing
        if in_crowd:
            load.drafts.note(
                spent.seconds, num_tokens, was_on=self._may_draft, num_turns=experience.num_turns
            )
        if plan.drafter is not None:
            was_asked_for = self.mode.drafter is not None
            experience.note_draft(
                load, plan, num_drafted, num_tokens, spent.seconds, was_asked_for=was_asked_for
            )
            return
        experience.budget.note(spent.seconds, 0.0)
        load.note_plain(spent, was_early=plan.early, is_among_drafts=in_crowd and self._may_draft)
        if self._is_early_tried:
            load.early.note(spent.seconds, num_tokens, was_on=plan.early, num_turns=experience.num_turns)

    @property
    def is_choosing(self) -> bool:
        """Whether it matters what drafters would propose."""
        return self.mode is DraftingMode.AUTO and self.experience.may_try

    def is_well_known(self, drafter: Drafter) -> bool:
        """Whether earlier turns have seen what such drafts are worth."""
        return not self.is_apart and self.experience.acceptance[drafter].weight >= WELL_KNOWN

    def acceptance(self, drafter: Drafter) -> float:
        """The probability that the next drafted token is the right one."""
        return self._acceptance[drafter].value

    def note_token(self, drafter: Drafter, *, was_right: bool) -> None:
        """Hears whether the next token that a drafter proposed, or would have proposed, was the right one."""
        self._acceptance[drafter].note(float(was_right))
        if not self.is_apart:
            self.experience.acceptance[drafter].note(float(was_right), 0.02)

    def _is_drafting_allowed(self) -> bool:
        """Whether the next round may have a draft, if one promises to pay."""
        if self.mode.drafter is not None:
            return True
        if not self.is_choosing:
            return False
        if self._load.is_crowd:
            return self._load.drafts.choose(self.experience.num_turns)
        return not self._load.wants_plain

    def _is_early(self) -> bool:
        if self.early is not None:
            return self.early
        if not self.experience.may_try:
            return False
        trials = self._load.early
        if self._load.is_crowd and self._may_draft:
            return trials.is_better  # tried where drafts of others do not disturb
        self._is_early_tried = True
        return trials.choose(self.experience.num_turns)

    def _drafted(self, most: int, has_expert: Callable[[], bool]) -> Plan | None:
        if not self._may_draft:
            return None
        forced = self.mode.drafter
        if forced is not None:
            if forced not in self.drafters or (forced is Drafter.EXPERT and not has_expert()):
                return None
            return self._with(forced, min(FORCED_TOKENS, most), 0.0)
        best, best_speed = None, MARGIN
        for drafter in self.drafters:
            if not self._is_judged(drafter):
                continue
            for count in self._lengths(drafter):
                speed = self._load.speed_up(drafter, count, self.acceptance(drafter))
                if count <= most and speed > best_speed and (drafter is not Drafter.EXPERT or has_expert()):
                    plan = self._with(drafter, count, self.least_probability)
                    if plan is not None and self.experience.can_afford(self._load, drafter, count):
                        best, best_speed = plan, speed
        return best

    def _lengths(self, drafter: Drafter) -> tuple[int, ...]:
        """How long a draft may be; of a crowd all are of one length, as only what is made together shares forwards."""
        if not self._load.is_crowd or not self.is_well_known(drafter):
            return LENGTHS
        usual = self.experience.acceptance[drafter].value
        return (max(LENGTHS, key=lambda count: self._load.speed_up(drafter, count, usual)),)

    def _is_judged(self, drafter: Drafter) -> bool:
        return self.num_seen >= FEWEST_SEEN or self.is_well_known(drafter)

    def _with(self, drafter: Drafter, num_tokens: int, least_probability: float) -> Plan | None:
        if drafter is not Drafter.LOOKUP:
            return Plan(drafter, num_tokens, least_probability)
        ids = before_end(self.lookup.propose(num_tokens), self.end_ids)
        return Plan(drafter, num_tokens, ids=ids) if ids else None
