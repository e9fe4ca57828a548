"""Whether drafting pays, simulated on a clock of its own: a drafter is used where all turns together gain by it."""

from __future__ import annotations

import heapq
import random
from collections.abc import Mapping
from dataclasses import dataclass, field

import pytest

from router_service.draft_experience import STALE_SECONDS, Experience, Spent
from router_service.draft_policy import TurnDrafting
from router_service.draft_trials import Trials
from router_service.drafting import Drafter, DraftingMode, Lookup, Plan

PLAIN_SECONDS = 0.01
NEVER_RIGHT = dict.fromkeys(Drafter, 0.0)
WORK = {Drafter.ROUTER: 0.2, Drafter.EXPERT: 0.5, Drafter.LOOKUP: 0.0}


@dataclass
class Writing:
    """A turn of the simulation and the round that it waits for."""

    drafting: TurnDrafting
    num_written: int = 0
    plan: Plan = field(default_factory=Plan)
    took: float = 0.0


@dataclass
class World:
    """Turns whose rounds cost what this world says, with drafts that come true as often as it says.

    A round takes a time that all turns share (1 - `own` of a plain token, longer with a draft), and one for the work of
    each of the turns that run: so several turns are cheaper than one after the other, the less so the larger `own`.

    Attributes:
        acceptance: of each drafter, the probability that a drafted token is right.
        own: share of a plain token's time that each further turn adds to everybody's round.
        work: what drafting one token adds, in plain tokens.
        check: what checking one token adds, in plain tokens.
        num_turns: at a time; each is followed by another one.
        turn_tokens: how long each is.
    """

    acceptance: Mapping[Drafter, float]
    own: float = 0.1
    work: Mapping[Drafter, float] = field(default_factory=lambda: WORK)
    check: float = 0.05
    num_turns: int = 1
    turn_tokens: int = 128
    early_share: float = 1.0
    is_apart: bool = False
    seed: int = 1
    experience: Experience = field(default_factory=Experience)
    now: float = 1000.0
    by: dict[Drafter | None, int] = field(default_factory=dict)
    num_early: int = 0

    def __post_init__(self) -> None:
        self.experience.clock = lambda: self.now

    def speed(self, num_tokens: int, mode: DraftingMode = DraftingMode.AUTO) -> float:
        """Tokens per time of plain tokens in this world, after so many more tokens."""
        self.by = dict.fromkeys([None, *Drafter], 0)
        self.num_early = 0
        rng = random.Random(self.seed)
        running: list[tuple[float, int]] = []
        began, num_written = self.now, 0
        turns = [self._new_turn(mode) for _ in range(self.num_turns)]
        self.experience.num_turns = self.num_turns
        plain = PLAIN_SECONDS * (1.0 - self.own + self.own * self.num_turns) / self.num_turns
        for number in range(self.num_turns):
            self._begin_round(turns, number, running, rng)
        while num_written < num_tokens:
            self.now, number = heapq.heappop(running)
            turn = turns[number]
            num_written += self._end_round(turn, rng)
            if turn.num_written >= self.turn_tokens:
                turns[number] = self._new_turn(mode)
            self._begin_round(turns, number, running, rng)
        return num_written * plain / (self.now - began)

    def _new_turn(self, mode: DraftingMode) -> Writing:
        lookup = Lookup([index % 5 for index in range(40)])
        lookup.note_last()
        early = False if self.early_share == 1.0 else None
        return Writing(
            TurnDrafting(mode, tuple(Drafter), self.experience, lookup, early=early, is_apart=self.is_apart)
        )

    def _begin_round(
        self, turns: list[Writing], number: int, running: list[tuple[float, int]], rng: random.Random
    ) -> None:
        turn = turns[number]
        turn.plan = turn.drafting.plan(self.turn_tokens - turn.num_written, lambda: True)
        shared = 1.0 + self._work(turn.plan)
        own = sum(1.0 + each.plan.num_tokens * self.check + self._work(each.plan) for each in turns)
        turn.took = PLAIN_SECONDS * ((1.0 - self.own) * shared + self.own * own) * rng.uniform(0.9, 1.1)
        if turn.plan.early:
            turn.took *= self.early_share
            self.num_early += 1
        heapq.heappush(running, (self.now + turn.took, number))

    def _work(self, plan: Plan) -> float:
        return 0.0 if plan.drafter is None else plan.num_tokens * self.work[plan.drafter]

    def _end_round(self, turn: Writing, rng: random.Random) -> int:
        plan, drafting, given = turn.plan, turn.drafting, 1
        if plan.drafter is None:
            for drafter, share in self.acceptance.items():
                drafting.note_token(drafter, was_right=rng.random() < share)
        else:
            for _ in range(plan.num_tokens):
                right = rng.random() < self.acceptance[plan.drafter]
                drafting.note_token(plan.drafter, was_right=right)
                if not right:
                    break
                given += 1
        router = 0.2 * turn.took if plan.drafter is None else 0.0
        drafting.note_round(plan, plan.num_tokens, given, Spent(turn.took, router, 0.5 * turn.took))
        drafting.num_seen += given
        turn.num_written += given
        self.by[plan.drafter] += given
        return given


def right(drafter: Drafter, share: float) -> dict[Drafter, float]:
    return {**NEVER_RIGHT, drafter: share}


# --- one turn ----------------------------------------------------------------------------------------------------


def test_a_lookup_that_is_right_is_used() -> None:
    world = World(right(Drafter.LOOKUP, 0.9))
    assert world.speed(400) > 2.0
    assert world.by[Drafter.LOOKUP] > 300


@pytest.mark.parametrize("seed", range(5))
def test_a_cheap_router_that_is_often_right_soon_gains_what_it_always_gains(seed: int) -> None:
    """Like a family whose router is a quarter of an expert's size, in short turns."""
    forced = World(right(Drafter.ROUTER, 0.7), turn_tokens=12, seed=seed).speed(2000, DraftingMode.ROUTER)
    world = World(right(Drafter.ROUTER, 0.7), turn_tokens=12, seed=seed)
    assert world.speed(200) > 1.0 + 0.4 * (forced - 1.0)
    assert world.speed(400) > 1.0 + 0.7 * (forced - 1.0)


def test_a_drafter_that_pays_is_used_though_another_one_was_tried_in_vain() -> None:
    experience = Experience()
    World({**NEVER_RIGHT, Drafter.LOOKUP: 0.6}, check=2.0, experience=experience).speed(100)
    world = World(right(Drafter.ROUTER, 0.8), experience=experience)
    world.speed(100)
    assert world.speed(300) > 1.3


@pytest.mark.parametrize("num_turns", [1, 3, 16])
def test_drafts_that_are_always_wrong_cost_next_to_nothing(num_turns: int) -> None:
    world = World(NEVER_RIGHT, num_turns=num_turns)
    assert world.speed(400) > 0.97
    assert world.by[None] > 390


def test_checking_that_turns_out_dear_is_given_up_soon() -> None:
    """Acceptance promises much, but a round costs far more than was to be expected."""
    world = World(dict.fromkeys(Drafter, 0.6), check=20.0)
    world.speed(200)
    assert world.speed(400) > 0.97
    assert world.by[None] > 380


@pytest.mark.parametrize("num_turns", [1, 8])
def test_a_turn_whose_drafts_fail_is_not_fooled_by_earlier_turns_for_long(num_turns: int) -> None:
    experience = Experience()
    World(right(Drafter.LOOKUP, 0.95), experience=experience, num_turns=num_turns).speed(400 * num_turns)
    assert World(NEVER_RIGHT, experience=experience, num_turns=num_turns).speed(256 * num_turns) > 0.97


def test_texts_that_are_easy_and_hard_by_turns_are_no_slower_in_all() -> None:
    experience, speeds = Experience(), []
    for number in range(12):
        easy = right(Drafter.LOOKUP, 0.9 * (number % 2))
        speeds.append(World(easy, experience=experience, turn_tokens=40, seed=number).speed(40))
    assert len(speeds) / sum(1.0 / each for each in speeds) > 1.0


def test_what_drafts_on_demand_have_lost_does_not_keep_others_from_drafting() -> None:
    world = World(right(Drafter.ROUTER, 0.9))
    world.speed(100)
    World(NEVER_RIGHT, experience=world.experience).speed(200, DraftingMode.EXPERT)
    assert World(right(Drafter.ROUTER, 0.9), experience=world.experience).speed(200) > 1.4


def test_drafts_are_measured_against_what_a_plain_token_takes_now() -> None:
    """A machine that becomes faster makes plain tokens worth less, too."""
    world = World(right(Drafter.ROUTER, 0.7))
    world.speed(500)
    before = world.experience.load.token_seconds.value
    assert world.by[Drafter.ROUTER] > 400
    world.speed(2000)
    assert world.by[None] > 30
    assert world.experience.load.token_seconds.value != before


def test_turns_that_may_not_write_everything_judge_drafts_for_themselves_only() -> None:
    """Where masks reject what drafters propose, few drafts are made, and others are not discouraged."""
    experience = Experience()
    World(right(Drafter.ROUTER, 0.8), experience=experience).speed(300)
    masked = World(NEVER_RIGHT, experience=experience, is_apart=True, turn_tokens=32)
    known = experience.acceptance[Drafter.ROUTER].value
    assert masked.speed(400) > 0.99
    assert experience.acceptance[Drafter.ROUTER].value == known
    assert World(right(Drafter.ROUTER, 0.8), experience=experience, is_apart=True).speed(400) > 1.3


# --- several turns -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_turns", [3, 16, 40])
def test_a_crowd_drafts_where_all_of_them_gain(num_turns: int) -> None:
    """Rounds take little more with many turns, as with tiny models: a draft saves rounds."""
    world = World(right(Drafter.ROUTER, 0.8), own=0.02, num_turns=num_turns, turn_tokens=24)
    world.speed(60 * num_turns)
    assert world.speed(100 * num_turns) > 1.3


def test_a_crowd_does_not_draft_what_one_turn_takes_from_the_others() -> None:
    """Each alone would gain much by a draft, as the others pay for it; together they lose."""
    world = World(right(Drafter.ROUTER, 0.7), own=0.5, check=0.7, num_turns=16)
    together = World(right(Drafter.ROUTER, 0.7), own=0.5, check=0.7, num_turns=16)
    assert together.speed(2000, DraftingMode.ROUTER) < 0.9
    assert world.speed(16 * 512) > 0.97
    assert world.by[None] > 0.9 * 16 * 512


def test_each_load_has_its_own_rounds() -> None:
    """What pays alone does not in a crowd that works to capacity, and does again afterwards."""
    experience = Experience()
    alone = {"acceptance": right(Drafter.ROUTER, 0.7), "own": 0.5, "check": 0.1, "experience": experience}
    World(**alone).speed(300)
    World(**{**alone, "check": 0.8, "work": {**WORK, Drafter.ROUTER: 0.4}}, num_turns=16).speed(3000)
    world = World(**alone, seed=2)
    assert world.speed(200) > 1.2


def test_nothing_is_drafted_with_more_turns_than_may() -> None:
    world = World(right(Drafter.LOOKUP, 0.9), experience=Experience(up_to_turns=2), num_turns=3)
    world.speed(300)
    assert world.by[None] >= 300


def test_rounds_during_which_the_load_has_changed_are_not_counted() -> None:
    experience = Experience()
    lookup = Lookup([])
    drafting = TurnDrafting(DraftingMode.AUTO, tuple(Drafter), experience, lookup)
    with experience.one_more_turn():
        plan = drafting.plan(9, lambda: False)
        with experience.one_more_turn():
            drafting.note_round(plan, 0, 1, Spent(1.0))
            assert experience.load.token_seconds.weight == 0.0
        assert experience.load.token_seconds.weight == 0.0
        drafting.note_round(plan, 0, 1, Spent(1.0))
        assert experience.load.token_seconds.value == 1.0


def test_a_drafter_with_nothing_to_propose_costs_what_it_costs() -> None:
    """Its rounds are not taken for plain ones, which would make drafts look cheap."""
    world = World(right(Drafter.ROUTER, 0.9))
    world.speed(100)
    load, plan = world.experience.load, Plan(Drafter.ROUTER, 2)
    drafting = world._new_turn(DraftingMode.ROUTER).drafting
    before = load.token_seconds.value
    for _ in range(50):
        drafting.note_round(plan, 0, 1, Spent(10 * PLAIN_SECONDS))
    assert load.token_seconds.value == before
    assert load.cost(Drafter.ROUTER, 2) == pytest.approx((10 * PLAIN_SECONDS, 0.0), rel=0.1, abs=0.1)


# --- asking early ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("early_share", "is_better"), [(0.8, True), (1.3, False)])
@pytest.mark.parametrize("num_turns", [1, 16])
def test_asking_early_is_kept_where_it_is_faster(early_share: float, num_turns: int, is_better: bool) -> None:
    world = World(NEVER_RIGHT, early_share=early_share, num_turns=num_turns)
    world.speed(100 * num_turns)
    rounds = 400 * num_turns
    speed = world.speed(rounds)
    assert (world.num_early > 0.8 * rounds) if is_better else (world.num_early < 0.06 * rounds)
    assert speed > (1.15 if is_better else 0.97)


def test_asking_early_is_found_out_anew_for_each_load() -> None:
    experience = Experience()
    World(NEVER_RIGHT, early_share=0.7, experience=experience).speed(500)
    world = World(NEVER_RIGHT, early_share=1.5, experience=experience, num_turns=6)
    world.speed(600)
    world.speed(2000)
    assert world.num_early < 200
    world = World(NEVER_RIGHT, early_share=0.7, experience=experience)
    world.speed(300)
    assert world.num_early > 250


def test_what_was_found_out_long_ago_is_tried_again() -> None:
    world = World(NEVER_RIGHT, early_share=1.5)
    world.speed(5_000)
    world.early_share = 0.7
    world.now += 2 * STALE_SECONDS
    world.speed(300)
    assert world.num_early > 150


def test_trials_follow_what_has_changed_and_bear_a_hiccup() -> None:
    trials, rng = Trials(), random.Random(3)

    def rounds(number: int, on_seconds: float) -> int:
        num_on = 0
        for _ in range(number):
            is_on = trials.choose()
            num_on += is_on
            hiccup = 100.0 if rng.random() < 0.02 else 0.0
            trials.note((on_seconds if is_on else 1.0) * rng.uniform(0.9, 1.1) + hiccup, 1, was_on=is_on)
        return num_on

    rounds(400, 0.7)
    assert rounds(1000, 0.7) > 900
    rounds(4096 * 4, 1.5)
    assert rounds(1000, 1.5) < 100
