"""Which items are asked, and in which order."""

from __future__ import annotations

from collections import defaultdict

from fusionroute.lab.tasks import Group, Item, Split, evaluation_items, fact_of


def rounds_of_items(num_rounds: int, seed: int = 0) -> list[list[Item]]:
    """Held-out items in rounds: each round has one item of every task, so that any number of rounds is fair.

    Args:
        num_rounds: items of each task.
        seed: of the draw; the same one gives the same items, also in the rounds of a longer call.
    """
    by_task: dict[str, list[Item]] = defaultdict(list)
    for item in evaluation_items(Split.TEST, per_task=num_rounds, seed=seed):
        by_task[item.task].append(item)
    return [list(each) for each in zip(*by_task.values(), strict=True)]


def is_covered(item: Item) -> bool:
    """Whether some expert was taught every token of the answer; the others are gaps."""
    return item.group is not Group.GAP


def cluster_of(item: Item) -> str:
    """What items share that rise and fall together: the fact they ask for, else the whole prompt."""
    return fact_of(item.prompt) or item.prompt
