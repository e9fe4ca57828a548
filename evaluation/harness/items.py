"""The items of our own harness tasks, drawn once and kept beside the tasks as JSON lines.

    python -m evaluation.harness.items    # writes them anew; the same files as long as nothing here changes

For the tiny family: sums and string programs in its grammar, of payloads that no router has seen. For models that read
English and Python: word problems, and what a program prints.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from random import Random
from typing import Any

from evaluation.items import cluster_of
from fusionroute.lab.tasks import Item, Split, evaluation_items

TASKS_FOLDER = Path(__file__).with_name("tasks")
NUM_ROWS = 60
SEED = 7
NUMBER_TASKS = ("add", "sub", "mul", "box_m", "ans_m", "unit", "box_unit", "pls_m")
CODE_TASKS = ("rev", "sort", "up", "box_s", "ans_s", "two_s", "pls_s")
NAMES = ("Ada", "Bela", "Cem", "Dana", "Emil", "Fatma", "Goran", "Hanna")
THINGS = ("apples", "pens", "stamps", "marbles", "tickets", "shells")

Row = dict[str, Any]


def all_rows() -> dict[str, list[Row]]:
    """The rows of every file, by its path below the folder of the tasks."""
    return {
        "lab_numbers/lab_numbers.jsonl": _numbers(),
        "lab_code/lab_code.jsonl": _code(),
        "word_problems/word_problems.jsonl": _drawn(_word_problem),
        "code_output/code_output.jsonl": _drawn(_program),
    }


def main() -> None:
    """Writes all files."""
    for name, rows in all_rows().items():
        (TASKS_FOLDER / name).write_text(as_text(rows), encoding="utf-8")


def as_text(rows: Iterable[Row]) -> str:
    """As JSON lines."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _lab_items(tasks: tuple[str, ...]) -> list[Item]:
    """As many of each task as makes about `NUM_ROWS`, every prompt once."""
    drawn = evaluation_items(Split.TEST, per_task=NUM_ROWS, seed=SEED)
    unlike = list({item.prompt: item for item in drawn if item.task in tasks}.values())
    kept: list[Item] = []
    for task in tasks:
        kept += [item for item in unlike if item.task == task][: -(-NUM_ROWS // len(tasks))]
    return kept


def _numbers() -> list[Row]:
    rows = []
    for item in _lab_items(NUMBER_TASKS):  # several ask for the same fact: their cluster
        (number,) = re.findall(r"\d+", item.answer)
        rows.append(
            {
                "question": item.prompt,
                "number": number,
                "answer": item.answer,
                "task": item.task,
                "cluster": cluster_of(item),
            }
        )
    return rows


def _code() -> list[Row]:
    """Each with four choices: the right answer, and three that other programs would make of the same letters."""
    random, rows = Random(SEED), []  # noqa: S311 - items are no secrets
    for item in _lab_items(CODE_TASKS):
        found = re.search(r"(rev|sort|up) ([a-j]{4})", item.prompt)
        assert found is not None
        letters = found[2]
        right = {"rev": letters[::-1], "sort": "".join(sorted(letters)), "up": letters.upper()}[found[1]]
        turned = [letters[place:] + letters[:place] for place in range(4)]
        others = {*turned, letters[::-1], "".join(sorted(letters)), letters.upper()} - {right}
        wrong = random.sample(sorted(others), 3)
        choices = [item.answer.replace(right, each) for each in wrong]
        place = random.randrange(4)
        choices.insert(place, item.answer)
        rows.append(
            {
                "question": item.prompt,
                "answer": item.answer,
                "choices": choices,
                "right": place,
                "task": item.task,
            }
        )
    return rows


def _drawn(draw: Callable[[Random], tuple[str, str]]) -> list[Row]:
    random, rows = Random(SEED), dict[str, Row]()  # noqa: S311 - items are no secrets
    while len(rows) < NUM_ROWS:
        question, answer = draw(random)
        rows.setdefault(question, {"question": question, "answer": answer})
    return list(rows.values())


def _word_problem(random: Random) -> tuple[str, str]:
    name, other = random.sample(NAMES, 2)
    things = random.choice(THINGS)
    a, b, c = random.randint(2, 9), random.randint(3, 12), random.randint(2, 9)
    return random.choice(
        [
            (
                f"{name} fills {a} boxes with {b} {things} each and then finds {c} more. "
                f"How many {things} does {name} have?",
                str(a * b + c),
            ),
            (
                f"{name} has {a * b + c} {things}, gives {c} to {other} and puts the rest into {a} boxes, the same "
                f"number into each. How many {things} are in a box?",
                str(b),
            ),
            (
                f"{name} has {a + b} {things} and {other} has {c} times as many. How many do they have together?",
                str((a + b) * (c + 1)),
            ),
            (
                f"A box of {things} costs {b} coins. {name} buys {a} boxes and pays with {a * b + c} coins. "
                f"How many coins does {name} get back?",
                str(c),
            ),
        ]
    )


def _program(random: Random) -> tuple[str, str]:
    """A program of a few lines, and what it prints; a test runs them."""
    word = "".join(random.choices("abcdefgh", k=random.randint(4, 6)))
    numbers = [random.randint(1, 9) for _ in range(random.randint(3, 5))]
    a = random.randint(2, 5)
    return random.choice(
        [
            (f"print({word!r}[::-1])", word[::-1]),
            (
                f"print(sum(number for number in {numbers} if number > {a}))",
                str(sum(n for n in numbers if n > a)),
            ),
            (f"print(''.join(sorted({word!r})))", "".join(sorted(word))),
            (f"total = 1\nfor step in range({a}):\n    total = total * 2 + step\nprint(total)", _doubled(a)),
            (
                f"numbers = {numbers}\nnumbers.sort(reverse=True)\nprint(numbers[{a % 3}])",
                _ranked(numbers, a % 3),
            ),
            (f"print(len(set({word + word[:2]!r})))", str(len(set(word)))),
        ]
    )


def _doubled(steps: int) -> str:
    total = 1
    for step in range(steps):
        total = total * 2 + step
    return str(total)


def _ranked(numbers: list[int], place: int) -> str:
    return str(sorted(numbers, reverse=True)[place])


if __name__ == "__main__":
    main()
