"""Who drafts: lookup finds what followed before; a drafter is used where it pays and dropped where it does not."""

from __future__ import annotations

import random
from dataclasses import dataclass

import pytest

from router_service.draft_policy import Average, Experience, Trials, TurnDrafting
from router_service.drafting import Drafter, DraftingMode, Lookup, Plan

PLAIN_SECONDS = 0.01


def lookup_of(tokens: list[int]) -> Lookup:
    lookup = Lookup(tokens)
    lookup.note_last()
    return lookup


def test_lookup_proposes_what_followed_the_last_tokens_before() -> None:
    assert lookup_of([1, 2, 3, 4, 5, 9, 2, 3]).propose(2) == (4, 5)


def test_lookup_prefers_the_latest_place_and_the_longest_match() -> None:
    assert lookup_of([1, 2, 7, 0, 1, 2, 8, 0, 1, 2]).propose(1) == (8,)
    assert lookup_of([5, 1, 2, 7, 0, 6, 1, 2, 8, 0, 5, 1, 2]).propose(1) == (7,)


def test_lookup_goes_on_with_a_repetition_beyond_the_end_of_the_text() -> None:
    assert lookup_of([9, 1, 2, 3, 1, 2, 3]).propose(7) == (1, 2, 3, 1, 2, 3, 1)


@pytest.mark.parametrize("tokens", [[], [1], [1, 2], [1, 2, 3, 4]])
def test_lookup_proposes_nothing_for_what_is_new(tokens: list[int]) -> None:
    assert lookup_of(tokens).propose(4) == ()


def test_lookup_fed_token_by_token_finds_what_lookup_fed_at_once_finds() -> None:
    rng = random.Random(3)
    tokens: list[int] = []
    lookup = Lookup(tokens)
    for _ in range(300):
        tokens.append(rng.randrange(4))
        lookup.note_last()
        assert lookup.propose(5) == lookup_of(tokens).propose(5)


def test_acceptance_is_the_share_of_right_tokens_and_follows_a_text_that_becomes_easy() -> None:
    acceptance = Average()
    for _ in range(100):
        acceptance.note(0.0)
    for _ in range(10):
        acceptance.note(1.0)
    assert acceptance.value == pytest.approx(1.0 - 0.9**10)


def test_one_hiccup_does_not_spoil_a_time() -> None:
    seconds = Average()
    for _ in range(100):
        seconds.note_seconds(1.0)
    seconds.note_seconds(1000.0)
    assert seconds.value == pytest.approx(1.2)


@dataclass
class World:
    """Rounds that cost what this world says, with drafts that come true as often as it says.

    Attributes:
        acceptance: of each drafter, the probability that a drafted token is right.
        per_token: what each drafted token adds to a round, in plain tokens.
    """

    acceptance: dict[Drafter, float]
    per_token: dict[Drafter, float]
    seed: int = 1

    def run(self, num_tokens: int, experience: Experience) -> tuple[float, dict[Drafter | None, int]]:
        """Time of plain tokens / time taken, and how many tokens each drafter's rounds gave."""
        rng = random.Random(self.seed)
        tokens = [index % 5 for index in range(40)]
        drafting = TurnDrafting(DraftingMode.AUTO, tuple(Drafter), experience, lookup_of(tokens), early=False)
        seconds, written, by = 0.0, 0, dict.fromkeys([None, *Drafter], 0)
        with experience.one_more_turn():
            while written < num_tokens:
                plan = drafting.plan(num_tokens - written, can_be_early=True)
                noise = rng.uniform(0.9, 1.1)
                if plan.drafter is None:
                    took, given = PLAIN_SECONDS * noise, 1
                    experience.note_token(plan, took, took / 2, took / 2)
                    for drafter, share in self.acceptance.items():
                        drafting.note_token(drafter, was_right=rng.random() < share)
                else:
                    took, given = self._drafted(plan, drafting, noise, rng)
                    experience.note_round(plan, plan.num_tokens, given, took)
                by[plan.drafter] += given
                drafting.num_seen += given
                seconds, written = seconds + took, written + given
        return written * PLAIN_SECONDS / seconds, by

    def _drafted(
        self, plan: Plan, drafting: TurnDrafting, noise: float, rng: random.Random
    ) -> tuple[float, int]:
        assert plan.drafter is not None
        took = PLAIN_SECONDS * (1.0 + plan.num_tokens * self.per_token[plan.drafter]) * noise
        given = 1
        for _ in range(plan.num_tokens):
            right = rng.random() < self.acceptance[plan.drafter]
            drafting.note_token(plan.drafter, was_right=right)
            if not right:
                break
            given += 1
        return took, given


COSTS = {Drafter.ROUTER: 0.5, Drafter.EXPERT: 0.5, Drafter.LOOKUP: 0.05}


def test_a_drafter_that_is_right_and_cheap_is_used() -> None:
    world = World({Drafter.ROUTER: 0.1, Drafter.EXPERT: 0.1, Drafter.LOOKUP: 0.9}, COSTS)
    speed_up, by = world.run(400, Experience())
    assert by[Drafter.LOOKUP] > 300
    assert speed_up > 2.0


def test_a_cheap_router_that_is_often_right_drafts() -> None:
    world = World({Drafter.ROUTER: 0.8, Drafter.EXPERT: 0.0, Drafter.LOOKUP: 0.0}, COSTS | {Drafter.ROUTER: 0.2})
    speed_up, by = world.run(400, Experience())
    assert by[Drafter.ROUTER] > 300
    assert speed_up > 1.3


def test_drafts_that_are_always_wrong_cost_next_to_nothing() -> None:
    world = World(dict.fromkeys(Drafter, 0.0), COSTS)
    speed_up, by = world.run(400, Experience())
    assert speed_up > 0.97
    assert by[None] > 390


def test_checking_that_turns_out_dear_is_given_up_soon() -> None:
    """Acceptance promises much, but a round costs far more than was to be expected."""
    world = World(dict.fromkeys(Drafter, 0.6), dict.fromkeys(Drafter, 2.0))
    experience = Experience()
    world.run(200, experience)
    speed_up, by = world.run(400, experience)
    assert speed_up > 0.97
    assert by[None] > 380


def test_a_turn_whose_drafts_fail_is_not_fooled_by_earlier_turns_for_long() -> None:
    experience = Experience()
    World({Drafter.ROUTER: 0.0, Drafter.EXPERT: 0.0, Drafter.LOOKUP: 0.95}, COSTS).run(400, experience)
    speed_up, _ = World(dict.fromkeys(Drafter, 0.0), COSTS).run(256, experience)
    assert speed_up > 0.97


def test_what_drafts_on_demand_have_lost_does_not_keep_others_from_drafting() -> None:
    experience = Experience()
    world = World({Drafter.ROUTER: 0.9, Drafter.EXPERT: 0.0, Drafter.LOOKUP: 0.0}, COSTS | {Drafter.ROUTER: 0.2})
    world.run(100, experience)
    for _ in range(200):
        experience.note_round(Plan(Drafter.EXPERT, 4), 4, 1, 10 * PLAIN_SECONDS, was_asked_for=True)
    _, by = world.run(100, experience)
    assert by[Drafter.ROUTER] > 80


def test_nothing_is_drafted_in_a_crowd() -> None:
    experience = Experience(up_to_turns=2, num_turns=2)
    world = World({Drafter.ROUTER: 0.1, Drafter.EXPERT: 0.1, Drafter.LOOKUP: 0.9}, COSTS)
    _, by = world.run(100, experience)
    assert by[None] == 100


def test_a_draft_is_shorter_than_what_may_still_be_written() -> None:
    drafting = TurnDrafting(
        DraftingMode.LOOKUP, tuple(Drafter), Experience(), lookup_of([1, 2, 3] * 5), early=False
    )
    assert drafting.plan(3, can_be_early=True).num_tokens == 2
    assert drafting.plan(1, can_be_early=True).drafter is None


@pytest.mark.parametrize(
    ("mode", "early", "num_turns", "looks"),
    [
        (DraftingMode.AUTO, False, 1, True),
        (DraftingMode.OFF, None, 1, True),
        (DraftingMode.OFF, False, 1, False),
        (DraftingMode.AUTO, None, 9, False),
        (DraftingMode.OFF, True, 9, True),
        (DraftingMode.EXPERT, False, 9, True),
    ],
)
def test_who_is_there_is_looked_up_where_it_matters(
    mode: DraftingMode, early: bool | None, num_turns: int, looks: bool
) -> None:
    drafting = TurnDrafting(mode, tuple(Drafter), Experience(num_turns=num_turns), lookup_of([]), early=early)
    assert drafting.looks_at_guess is looks


@pytest.mark.parametrize(("early_seconds", "is_better"), [(0.6, True), (1.5, False)])
def test_asking_early_is_kept_where_it_is_faster(early_seconds: float, is_better: bool) -> None:
    trials, rng = Trials(), random.Random(5)
    num_early = 0
    for _ in range(4000):
        early = trials.choose()
        num_early += early
        trials.note((early_seconds if early else 1.0) * rng.uniform(0.8, 1.2), early=early)
    assert (num_early > 3800) if is_better else (num_early < 200)
