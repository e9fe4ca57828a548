"""What the really trained demo family can do. Loose bounds: they tell a broken lab from a working one.

The family comes from the cache or is built first (about a CPU minute).
"""

from __future__ import annotations

import pytest

from fusionroute.lab.tasks import DOMAIN_TASKS, Group, Item, evaluation_items
from fusionroute.router_model import load_checkpoint
from trainer.lab_family import EXPERT_SLOTS, Family, build, shown
from trainer.lab_family.quality import RULES, exact_matches

pytestmark = [pytest.mark.lab, pytest.mark.slow, pytest.mark.timeout(900)]

Matches = dict[str, list[bool]]
COVERED = (Group.DOMAIN, Group.COMPOSITE)


@pytest.fixture(scope="module")
def items() -> list[Item]:
    return evaluation_items(per_task=60)


@pytest.fixture(scope="module")
def family() -> Family:
    with shown() as progress:
        return build("demo", seed=0, progress=progress)


@pytest.fixture(scope="module")
def matches(family: Family, items: list[Item]) -> Matches:
    return exact_matches(family.folder, items)


def share(matches: list[bool], items: list[Item], *kept: str) -> float:
    """Share of exact matches among the items of these tasks or groups."""
    chosen = [
        right for right, item in zip(matches, items, strict=True) if {item.task, item.group} & set(kept)
    ]
    return sum(chosen) / len(chosen)


@pytest.mark.parametrize(("slot", "owner"), [*zip(EXPERT_SLOTS, DOMAIN_TASKS, strict=True)])
def test_each_expert_masters_its_own_domain_and_no_other(matches, items, slot, owner) -> None:
    assert share(matches[slot], items, *DOMAIN_TASKS[owner]) >= 0.95
    assert share(matches[slot], items, Group.DOMAIN) < 0.5


def test_routing_alone_covers_what_the_experts_cover_and_no_gap(matches, items) -> None:
    assert share(matches["route"], items, Group.DOMAIN) >= 0.90
    assert share(matches["route"], items, Group.COMPOSITE) >= 0.80
    assert share(matches["route"], items, Group.GAP) <= 0.02


@pytest.mark.parametrize("rule", ["mixture", "select"])
def test_a_gate_fills_most_gaps_without_losing_what_is_covered(matches, items, rule) -> None:
    assert share(matches[rule], items, Group.GAP) >= 0.75
    assert share(matches[rule], items, *COVERED) >= 0.90


def test_after_phase_one_the_plain_sum_fills_few_gaps_and_the_gated_sum_more(matches, items) -> None:
    plain, gated = (share(matches[rule], items, Group.GAP) for rule in ("sum", "gated_sum"))
    assert 0.05 <= plain <= 0.45
    assert gated >= plain + 0.2


def test_preferences_bring_the_sum_above_phase_one_and_above_routing_only(matches, items) -> None:
    after = share(matches["cdpo/sum"], items, *Group)
    assert after - share(matches["sum"], items, *Group) >= 0.04
    assert after - share(matches["route"], items, *Group) >= 0.07


def test_the_complement_costs_little_where_the_experts_know_the_answer(matches, items) -> None:
    assert share(matches["cdpo/sum"], items, *COVERED) >= share(matches["cdpo/route"], items, *COVERED) - 0.08


def test_preferences_change_the_complement_and_not_the_routing(matches, items) -> None:
    assert share(matches["cdpo/route"], items, Group.DOMAIN) >= 0.90
    assert share(matches["cdpo/route"], items, Group.COMPOSITE) >= 0.80
    assert share(matches["cdpo/route"], items, Group.GAP) <= 0.02


def test_every_rule_beats_the_router_alone_where_experts_are_needed(matches, items) -> None:
    alone = share(matches["router"], items, Group.COMPOSITE)
    for rule in RULES:
        assert share(matches[rule], items, Group.COMPOSITE) >= alone + 0.2


def test_the_pairs_are_mistakes_that_the_experts_do_not_tell_apart(family) -> None:
    """Mean bias below zero, and the chosen answers are not pushed down with the rejected ones."""
    metrics = load_checkpoint(family.router).manifest.metrics
    assert metrics["bias/mean_at_start"] < 0
    assert metrics["logratio/chosen"] > -2.0
    assert metrics["logratio/rejected"] < -5.0
