"""Asking in rounds, with answers that are known beforehand, and the table that is made of them."""

from __future__ import annotations

import asyncio

import pytest

from evaluation.items import cluster_of, is_covered, rounds_of_items
from evaluation.questions import Answer, Outcome, Question
from evaluation.rounds import run_rounds
from evaluation.systems.ways import GATED, ROUTER_ALONE, ROUTING_ONLY, SUM, Way, main_ways
from evaluation.table import compare, scores, sentence, shown, to_json
from evaluation.tasks.lab import lab_rounds, verify
from fusionroute.lab.tasks import TASKS, Item

ROUNDS = lab_rounds(3)
ITEMS = rounds_of_items(3)
BOTH = [ROUTING_ONLY, SUM]


class Oracle:
    """Knows covered questions always, gaps only when asked to fuse; counts how many it answers at once."""

    def __init__(self) -> None:
        self.num_running = 0
        self.most_running = 0

    async def ask(self, question: Question, way: Way) -> Outcome:
        self.num_running += 1
        self.most_running = max(self.most_running, self.num_running)
        await asyncio.sleep(0.0001 * (len(question.prompt) % 5))
        self.num_running -= 1
        knows = question.strata["coverage"] == "covered" or way is SUM
        answer = Answer(question.reference if knows else "?", is_complete=True)
        return Outcome(question, way.name, 0, answer, verify(question, answer))


def test_every_round_has_one_question_of_every_task() -> None:
    for questions in ROUNDS:
        assert [question.task for question in questions] == list(TASKS)
    assert [[question.prompt for question in each] for each in ROUNDS] == [
        [item.prompt for item in items] for items in ITEMS
    ]


def test_more_rounds_begin_with_the_same_questions() -> None:
    assert lab_rounds(5)[:3] == ROUNDS
    assert rounds_of_items(5)[:3] == ITEMS


def test_gaps_are_what_no_expert_covers() -> None:
    for question, item in zip(ROUNDS[0], ITEMS[0], strict=True):
        assert question.strata["coverage"] == ("covered" if is_covered(item) else "gap")
    assert {question.strata["coverage"] for question in ROUNDS[0]} == {"covered", "gap"}


def test_a_fact_is_one_cluster_however_it_is_dressed() -> None:
    def item(prompt: str) -> Item:
        return Item("add", ITEMS[0][0].group, prompt, "7", "m", ITEMS[0][0].eos_owner)

    assert cluster_of(item("box: 4+3; rev jbef=")) == cluster_of(item("pls 4+3=")) == "4+3"
    assert cluster_of(item("ans: day 3=")) == "day 3"
    assert cluster_of(item("rev jbef=")) == "rev jbef="


def test_systems_are_experts_alone_then_the_rules_that_the_router_can_serve() -> None:
    rules = ["sum", "gated_sum", "select", "route", "router", "ensemble", "proxy"]
    assert [way.name for way in main_ways(["math", "code"], rules)] == [
        "expert/math",
        "expert/code",
        "router",
        "route",
        "sum",
        "gated_sum",
        "select",
    ]


def test_an_expert_alone_is_routing_fixed_to_it() -> None:
    assert main_ways(["math"], [])[0].options() == {"combine": "route", "expert": "math"}


async def test_outcomes_come_in_order_whatever_finishes_first() -> None:
    outcomes = await run_rounds(Oracle().ask, ROUNDS, BOTH, num_concurrent=7)
    expected = [(question, way.name) for questions in ROUNDS for question in questions for way in BOTH]
    assert [(outcome.question, outcome.system) for outcome in outcomes] == expected


async def test_as_many_requests_are_in_flight_as_allowed() -> None:
    oracle = Oracle()
    await run_rounds(oracle.ask, ROUNDS, [SUM], num_concurrent=5)
    assert oracle.most_running == 5


async def test_without_time_left_only_the_first_round_is_asked_and_it_is_whole() -> None:
    outcomes = await run_rounds(Oracle().ask, ROUNDS, BOTH, budget_seconds=0.0)
    assert [outcome.question for outcome in outcomes[::2]] == ROUNDS[0]


async def test_a_failing_answer_ends_the_run() -> None:
    async def broken(question: Question, way: Way) -> Outcome:
        raise ConnectionError("gone")

    with pytest.raises(ExceptionGroup) as caught:
        await run_rounds(broken, ROUNDS, [SUM])
    assert caught.group_contains(ConnectionError)


def test_an_answer_cut_short_is_wrong_even_where_its_text_is_right() -> None:
    question = ROUNDS[0][0]
    assert verify(question, Answer(question.reference, is_complete=True)).is_right
    assert not verify(question, Answer(question.reference, is_complete=False)).is_right


async def test_scores_keep_covered_and_gap_tasks_apart() -> None:
    route, fused = scores(await run_rounds(Oracle().ask, ROUNDS, BOTH), BOTH)
    assert (route.covered.value, route.gap.value) == (1.0, 0.0)
    assert (fused.covered.value, fused.gap.value) == (1.0, 1.0)


async def test_comparisons_say_what_is_gained_and_no_more_than_the_interval_allows() -> None:
    outcomes = await run_rounds(Oracle().ask, ROUNDS, BOTH)
    comparison = compare(outcomes, SUM, ROUTING_ONLY)
    assert comparison.gap.value == 1.0
    text = sentence(comparison)
    assert "no clear difference on covered tasks (+0.000" in text
    assert "gains on gap tasks (+1.000" in text
    assert "loses on gap tasks" in sentence(compare(outcomes, ROUTING_ONLY, SUM))


async def test_the_table_for_programs_names_systems_and_differences() -> None:
    outcomes = await run_rounds(Oracle().ask, ROUNDS[:1], BOTH)
    table = to_json(scores(outcomes, BOTH), [compare(outcomes, SUM, ROUTING_ONLY)])
    assert [row["system"] for row in table["scores"]] == ["route", "sum"]
    assert table["differences"][0]["first"] == "sum"


def test_an_estimate_is_shown_with_its_interval_and_where_asked_its_sign() -> None:
    right = [
        Outcome(question, "router", 0, answer, verify(question, answer))
        for question in ROUNDS[0]
        for answer in [Answer(question.reference, True)]
    ]
    estimate = scores(right, [ROUTER_ALONE])[0].covered
    assert shown(estimate) == f"1.000 [{estimate.low:.3f}, 1.000]"
    assert shown(estimate, signed=True).startswith("+1.000")
    assert GATED[0].label == "gated sum"
