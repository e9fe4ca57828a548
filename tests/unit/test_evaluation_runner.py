"""Running systems over items, with answerers that are known beforehand."""

from __future__ import annotations

import asyncio

import pytest

from evaluation.items import cluster_of, is_covered, longest_answer_tokens, rounds_of_items
from evaluation.runner import Answer, Outcome, run_rounds
from evaluation.systems.served import FUSED_SUM, GATED, ROUTER_ALONE, ROUTING_ONLY, System, systems_of
from evaluation.table import compare, scores, sentence, shown, to_json
from fusionroute.lab.tasks import TASKS, Item
from fusionroute.v1.router_pb2 import CombineRule

ROUNDS = rounds_of_items(3)
ITEMS_BY_PROMPT = {item.prompt: item for items in ROUNDS for item in items}


class Oracle:
    """Knows covered items always, gap items only when asked to fuse; counts how many it answers at once."""

    def __init__(self) -> None:
        self.num_running = 0
        self.most_running = 0

    async def answer(self, prompt: str, system: System) -> Answer:
        self.num_running += 1
        self.most_running = max(self.most_running, self.num_running)
        await asyncio.sleep(0.0001 * (len(prompt) % 5))
        self.num_running -= 1
        item = ITEMS_BY_PROMPT[prompt]
        knows = is_covered(item) or system is FUSED_SUM
        return Answer(item.answer if knows else "?", is_complete=True)


def test_every_round_has_one_item_of_every_task() -> None:
    for items in ROUNDS:
        assert [item.task for item in items] == list(TASKS)


def test_more_rounds_begin_with_the_same_items() -> None:
    assert rounds_of_items(5)[:3] == ROUNDS


def test_a_fact_is_one_cluster_however_it_is_dressed() -> None:
    def item(prompt: str) -> Item:
        return Item("add", ROUNDS[0][0].group, prompt, "7", "m", ROUNDS[0][0].eos_owner)

    assert cluster_of(item("box: 4+3; rev jbef=")) == cluster_of(item("pls 4+3=")) == "4+3"
    assert cluster_of(item("ans: day 3=")) == "day 3"
    assert cluster_of(item("rev jbef=")) == "rev jbef="


def test_the_longest_answer_counts_its_end() -> None:
    items = ROUNDS[0]
    assert longest_answer_tokens(items) == max(len(item.answer) for item in items) + 1


def test_systems_are_experts_alone_then_the_rules_that_the_router_can_serve() -> None:
    rules = [rule for rule in CombineRule.values() if rule != CombineRule.COMBINE_RULE_MIXTURE]
    systems = systems_of(["math", "code"], rules)
    assert [system.name for system in systems] == [
        "expert/math",
        "expert/code",
        "router",
        "route",
        "sum",
        "gated_sum",
        "select",
    ]


def test_an_expert_alone_is_routing_fixed_to_it() -> None:
    request = systems_of(["math"], [])[0].request("4+3=", 9)
    assert (request.combine, request.fixed_expert) == (CombineRule.COMBINE_RULE_ROUTE, "math")
    assert (request.sampling.max_tokens, request.sampling.temperature) == (9, 0.0)


async def test_outcomes_come_in_order_whatever_finishes_first() -> None:
    systems = [ROUTING_ONLY, FUSED_SUM]
    outcomes = await run_rounds(Oracle(), ROUNDS, systems, num_concurrent=7)
    expected = [(item, system) for items in ROUNDS for item in items for system in systems]
    assert [(outcome.item, outcome.system) for outcome in outcomes] == expected


async def test_as_many_requests_are_in_flight_as_allowed() -> None:
    oracle = Oracle()
    await run_rounds(oracle, ROUNDS, [FUSED_SUM], num_concurrent=5)
    assert oracle.most_running == 5


async def test_without_time_left_only_the_first_round_is_asked_and_it_is_whole() -> None:
    outcomes = await run_rounds(Oracle(), ROUNDS, [ROUTING_ONLY, FUSED_SUM], budget_seconds=0.0)
    assert [outcome.item for outcome in outcomes[::2]] == ROUNDS[0]


async def test_a_failing_answer_ends_the_run() -> None:
    class Broken:
        async def answer(self, prompt: str, system: System) -> Answer:
            raise ConnectionError("gone")

    with pytest.raises(ExceptionGroup) as caught:
        await run_rounds(Broken(), ROUNDS, [FUSED_SUM])
    assert caught.group_contains(ConnectionError)


def test_an_answer_cut_short_is_wrong_even_where_its_text_is_right() -> None:
    item = ROUNDS[0][0]
    assert Outcome(item, FUSED_SUM, Answer(item.answer, is_complete=True)).is_right
    assert not Outcome(item, FUSED_SUM, Answer(item.answer, is_complete=False)).is_right


async def test_scores_keep_covered_and_gap_tasks_apart() -> None:
    outcomes = await run_rounds(Oracle(), ROUNDS, [ROUTING_ONLY, FUSED_SUM])
    route, fused = scores(outcomes)
    assert (route.covered.value, route.gap.value) == (1.0, 0.0)
    assert (fused.covered.value, fused.gap.value) == (1.0, 1.0)


async def test_comparisons_say_what_is_gained_and_no_more_than_the_interval_allows() -> None:
    outcomes = await run_rounds(Oracle(), ROUNDS, [ROUTING_ONLY, FUSED_SUM])
    comparison = compare(outcomes, FUSED_SUM, ROUTING_ONLY)
    assert comparison.gap.value == 1.0
    text = sentence(comparison)
    assert "no clear difference on covered tasks (+0.000" in text
    assert "gains on gap tasks (+1.000" in text
    assert "loses on gap tasks" in sentence(compare(outcomes, ROUTING_ONLY, FUSED_SUM))


async def test_the_table_for_programs_names_systems_and_differences() -> None:
    outcomes = await run_rounds(Oracle(), ROUNDS[:1], [ROUTING_ONLY, FUSED_SUM])
    table = to_json(scores(outcomes), [compare(outcomes, FUSED_SUM, ROUTING_ONLY)])
    assert [row["system"] for row in table["scores"]] == ["route", "sum"]
    assert table["differences"][0]["first"] == "sum"


def test_an_estimate_is_shown_with_its_interval_and_where_asked_its_sign() -> None:
    estimate = scores([Outcome(item, ROUTER_ALONE, Answer(item.answer, True)) for item in ROUNDS[0]])[
        0
    ].covered
    assert shown(estimate) == f"1.000 [{estimate.low:.3f}, 1.000]"
    assert shown(estimate, signed=True).startswith("+1.000")
    assert GATED[0].label == "fused: gated sum"
