"""The task grammar, judged by a solver that knows the rules but not the code."""

from __future__ import annotations

import re
from random import Random

import pytest

from fusionroute.lab.tasks import (
    DAYS,
    MONTHS,
    TASKS,
    Group,
    Item,
    Owner,
    Payloads,
    Split,
    evaluation_items,
    examples,
    make_item,
    number_facts,
)
from fusionroute.lab.tokenizer import ALPHABET


def solve(question: str) -> str:
    """The answer to a question (a prompt without its ``=``), worked out anew."""
    if match := re.fullmatch(r"(box|ans|two): (.*)", question):
        inner = solve(match[2])
        return {"box": f"[{inner}]", "ans": f"Answer: {inner}.", "two": f"{inner} {inner}"}[match[1]]
    if match := re.fullmatch(r"pls (.*)", question):
        return f"{solve(match[1])}, ok?"
    if match := re.fullmatch(r"(.*); (.*)", question):
        return f"{solve(match[1])}; {solve(match[2])}"
    if match := re.fullmatch(r"(.*) kg", question):
        return f"{solve(match[1])} kg"
    if match := re.fullmatch(r"(\d+)([+*-])(\d+)", question):
        a, b = int(match[1]), int(match[3])
        return str({"+": a + b, "-": a - b, "*": a * b}[match[2]])
    if match := re.fullmatch(r"(rev|sort|up) ([a-j]{4})", question):
        letters = match[2]
        return {"rev": letters[::-1], "sort": "".join(sorted(letters)), "up": letters.upper()}[match[1]]
    if match := re.fullmatch(r"(day|month) (\d+)", question):
        return {"day": DAYS, "month": MONTHS}[match[1]][int(match[2]) - 1]
    assert re.fullmatch(r"[a-z0-9]{2,5}", question), question
    return question


def every_item() -> list[Item]:
    return [*evaluation_items(Split.TRAIN, 50), *evaluation_items(Split.TEST, 50), *examples()]


def payloads_of(item: Item) -> tuple[set[str], set[str]]:
    """Number facts and strings that occur in a prompt."""
    facts = set(re.findall(r"\d+[+*-]\d+", item.prompt))
    strings = set(re.findall(r"(?:rev|sort|up) ([a-j]{4})", item.prompt))
    if item.task in ("fbox", "fans", "ftwo"):
        strings.add(item.prompt[5:-1])
    return facts, strings


def test_every_answer_is_right() -> None:
    for item in every_item():
        assert item.prompt.endswith("=")
        assert item.answer == solve(item.prompt[:-1]), item


def test_there_are_23_tasks_in_three_groups() -> None:
    counts = {group: list(TASKS.values()).count(group) for group in Group}
    assert counts == {Group.DOMAIN: 9, Group.COMPOSITE: 8, Group.GAP: 6}


def test_every_character_of_an_answer_has_one_owner() -> None:
    for item in every_item():
        assert len(item.owners) == len(item.answer)
        assert set(item.owners) <= set(Owner)


def test_only_gap_tasks_have_characters_that_nobody_owns() -> None:
    for item in every_item():
        assert (Owner.NOBODY in item.owners) == (item.group is Group.GAP), item


@pytest.mark.parametrize(
    ("prompt", "answer", "owners"),
    [
        ("box: 4+4; rev jbef=", "[8; febj]", "fmffssssf"),
        ("pls 4+3=", "7, ok?", "mggggg"),
        ("ans: day 3=", "Answer: wed.", "ffffffffgggf"),
    ],
)
def test_the_examples_say_who_owns_what(prompt: str, answer: str, owners: str) -> None:
    item = {item.prompt: item for item in examples()}[prompt]
    assert (item.answer, item.owners) == (answer, owners)


def test_every_character_is_in_the_alphabet() -> None:
    for item in every_item():
        assert set(item.prompt + item.answer) <= set(ALPHABET)


def test_no_payload_of_the_test_split_occurs_in_the_train_split() -> None:
    seen: dict[Split, tuple[set[str], set[str]]] = {}
    for split in Split:
        items = [payloads_of(item) for item in evaluation_items(split, 300)]
        seen[split] = set().union(*(facts for facts, _ in items)), set().union(*(text for _, text in items))
    train, test = seen[Split.TRAIN], seen[Split.TEST]
    assert train[0] and test[0] and not train[0] & test[0]
    assert train[1] and test[1] and not train[1] & test[1]


def test_about_two_fifths_of_the_number_facts_are_held_out() -> None:
    items = evaluation_items(Split.TEST, 1000, tasks=("add", "sub", "mul"))
    held_out = {item.prompt for item in items}
    assert len(number_facts()) == 192
    assert 0.35 < len(held_out) / 192 < 0.45


def test_with_all_facts_both_splits_occur() -> None:
    payloads = Payloads(Random(0), Split.TRAIN, all_facts=True)
    prompts = {make_item(task, payloads).prompt for task in ("add", "sub", "mul") for _ in range(1000)}
    assert len(prompts) == 192


def test_the_same_seed_gives_the_same_items_and_another_seed_others() -> None:
    assert evaluation_items(seed=3, per_task=5) == evaluation_items(seed=3, per_task=5)
    assert evaluation_items(seed=3, per_task=5) != evaluation_items(seed=4, per_task=5)


def test_leaving_out_tasks_changes_nothing_for_the_others() -> None:
    everything = evaluation_items(per_task=3)
    assert evaluation_items(per_task=3, tasks=["ms"]) == [item for item in everything if item.task == "ms"]
