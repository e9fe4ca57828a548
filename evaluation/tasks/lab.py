"""The lab's generated tasks as questions, held-out and seen payloads apart."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from evaluation.items import cluster_of, is_covered, rounds_of_items
from evaluation.questions import RIGHT, Answer, Question, Verdict
from fusionroute.lab.tasks import TASKS, Group, Item, Split, evaluation_items

PAYLOAD = {Split.TEST: "held-out", Split.TRAIN: "seen"}
"""What the router's data knows of a payload, by the split it is drawn from."""

DIVISIONS = {
    "coverage": ("covered", "gap"),
    "group": tuple(str(group) for group in Group),
    "payload": tuple(PAYLOAD.values()),
}


def lab_questions(
    per_task: int,
    splits: Sequence[Split] = (Split.TEST,),
    *,
    seed: int = 0,
    tasks: Iterable[str] = tuple(TASKS),
) -> list[Question]:
    """As many questions of each task and split, so that all tasks weigh alike.

    Number facts (about 77 held out), days and months (19) are few: their questions repeat, under other ids and in the
    same cluster.

    Args:
        per_task: of each task and split.
        splits: where payloads come from.
        seed: of the draw; a task's questions do not depend on the other tasks.
    """
    numbers: Counter[tuple[str, Split]] = Counter()
    questions = []
    for split in splits:
        for item in evaluation_items(split, per_task, seed, tasks):
            numbers[item.task, split] += 1
            questions.append(_question(item, split, numbers[item.task, split]))
    return questions


def lab_rounds(num_rounds: int, seed: int = 0) -> list[list[Question]]:
    """Held-out questions in rounds: each round has one question of every task, so that any number of rounds is fair.

    Args:
        num_rounds: questions of each task.
        seed: of the draw; the same one gives the same questions, also in the rounds of a longer call.
    """
    return [
        [_question(item, Split.TEST, number) for item in items]
        for number, items in enumerate(rounds_of_items(num_rounds, seed), start=1)
    ]


def verify(question: Question, answer: Answer) -> Verdict:
    """Exact match, the end included."""
    if answer.is_complete and answer.text == question.reference:
        return RIGHT
    return Verdict(0.0, "another answer" if answer.is_complete else "does not end")


def _question(item: Item, split: Split, number: int) -> Question:
    return Question(
        id=f"{item.task}/{PAYLOAD[split]}/{number}",
        task=item.task,
        prompt=item.prompt,
        reference=item.answer,
        cluster=cluster_of(item),
        strata={
            "coverage": "covered" if is_covered(item) else "gap",
            "group": str(item.group),
            "payload": PAYLOAD[split],
        },
        max_tokens=len(item.answer) + 4,
    )
