"""What lookup proposes, and what a turn's drafts may hold."""

from __future__ import annotations

import random

import pytest

from router_service.draft_experience import Average, Experience
from router_service.draft_policy import TurnDrafting
from router_service.drafting import PLAIN, Drafter, DraftingMode, Lookup


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


def test_a_draft_is_shorter_than_what_may_still_be_written() -> None:
    drafting = TurnDrafting(
        DraftingMode.LOOKUP, tuple(Drafter), Experience(), lookup_of([1, 2, 3] * 5), early=False
    )
    assert len(drafting.plan(3, lambda: True).ids) == 2
    assert drafting.plan(1, lambda: True).drafter is None


@pytest.mark.parametrize(("end_ids", "wanted"), [({}, (2, 3, 1, 2)), ({1}, (2, 3)), ({2}, ())])
def test_a_lookup_proposes_nothing_from_the_end_of_an_answer_on(
    end_ids: set[int], wanted: tuple[int, ...]
) -> None:
    drafting = TurnDrafting(
        DraftingMode.LOOKUP,
        tuple(Drafter),
        Experience(),
        lookup_of([*[1, 2, 3] * 5, 1]),
        end_ids=frozenset(end_ids),
    )
    assert drafting.plan(9, lambda: False).ids == wanted


@pytest.mark.parametrize(
    ("mode", "early", "num_turns", "looks"),
    [
        (DraftingMode.AUTO, False, 1, False),  # nothing is known yet that a draft would gain
        (DraftingMode.OFF, None, 1, False),  # trials begin without
        (DraftingMode.OFF, None, 9, False),
        (DraftingMode.OFF, True, 9, True),
        (DraftingMode.EXPERT, False, 9, True),
    ],
)
def test_who_is_there_is_looked_up_where_it_matters(
    mode: DraftingMode, early: bool | None, num_turns: int, looks: bool
) -> None:
    experience = Experience(up_to_turns=8, num_turns=num_turns)
    drafting = TurnDrafting(mode, tuple(Drafter), experience, lookup_of([]), early=early)
    num_looks = 0

    def look() -> bool:
        nonlocal num_looks
        num_looks += 1
        return False

    assert drafting.plan(9, look) == PLAIN
    assert num_looks == looks
