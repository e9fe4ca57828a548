"""Tasks beside the lab's whose answer nobody knows alone: an expert knows its row of a board, the router its column.

            red blue green gold        even k blue=f      row of the key k: the expert alone knows it
    row 0    a   b    c     d          skew k blue=f      column of the word blue: the router's data alone tell it
    row 1    e   f    g     h          row k=1            covered: the expert's half by itself
                                       col blue=1         gap: the router's half by itself

Of the letter the expert knows four candidates and the router two, and no way to tell them apart but how often each is
right. In ``even`` all are equally frequent; in ``skew`` row 0 is right in 70 % of all cases and so is column 0, each
other column in 10 %. Where neither is the frequent one, the right letter is the first choice of no model and of no
mixture of the two, while the product of both distributions has its maximum there. A share w of the router would have
to be below 1 / 5 for the letter to beat the router's favourite, and above 2 / 3 to beat the expert's. In ``even`` a
mixture has its maximum there too: equal halves add up.

A key is one character, and nothing but hearing of it tells its row. The characters are dealt to three splits: the
router learns from the keys of one, gates may be fitted on those of another, which no router has met, and the third is
for testing.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from functools import cache
from random import Random

BOARD = "abcdefgh"
NUM_ROWS, NUM_COLUMNS = 2, 4
COLUMN_WORDS = ("red", "blue", "green", "gold")
COLUMN_PERCENT = (70, 10, 10, 10)
"""How often each column is right in `skew`."""
KEY_CHARACTERS = "abcdefghijklmnopqrstuvwxyz0123456789ABCDEFGHIJ"
SPLIT_SHARES = (0.44, 0.28, 0.28)
"""Share of the characters that keys of each split are made of, in the order of `Split`."""
ROW_PERCENT = (70, 30)
"""How often each row is asked for in `skew`."""


class Task(StrEnum):
    """The tasks with two views, and each view by itself."""

    EVEN = "even"
    SKEW = "skew"
    ROW = "row"
    COLUMN = "col"


class Split(StrEnum):
    """Who has met a key, apart from the expert, which knows all."""

    ROUTER = "router"
    GATE = "gate"
    TEST = "test"


class Owner(StrEnum):
    """Who knows a character of an answer."""

    ROW = "r"
    COLUMN = "c"
    BOTH = "b"


class Part(StrEnum):
    """How items are told apart in a table."""

    EVEN = "even"
    SKEW_FREQUENT = "skew, row or column frequent"
    SKEW_RARE = "skew, neither frequent"
    ROW = "row alone"
    COLUMN = "column alone"


@dataclass(frozen=True, slots=True)
class ViewItem:
    """One prompt with its only right answer.

    Attributes:
        task: which.
        prompt: text that ends with ``=``.
        answer: one letter or digit, without the end-of-sequence token.
        owners: one `Owner` letter for each character of the answer.
        eos_owner: who knows that the answer ends there.
        key: whose row is asked for; "" where none is.
        row, column: of the right letter; 0 where none is asked for.
    """

    task: Task
    prompt: str
    answer: str
    owners: str
    eos_owner: Owner
    key: str = ""
    row: int = 0
    column: int = 0

    @property
    def part(self) -> Part:
        """Where it belongs in a table."""
        if self.task is Task.SKEW:
            return Part.SKEW_RARE if self.row and self.column else Part.SKEW_FREQUENT
        return {Task.EVEN: Part.EVEN, Task.ROW: Part.ROW, Task.COLUMN: Part.COLUMN}[self.task]

    @property
    def cluster(self) -> str:
        """What items share that are right and wrong together."""
        return self.key or self.prompt


@dataclass(frozen=True, slots=True)
class Views:
    """A source of items that keeps to one split.

    Attributes:
        random: of the draws.
        split: which keys may occur; None = all of them, as the expert sees them.
        knows_columns: whether the letter is in the word's column; else in one that is drawn, as often as the task says:
            this is all that the expert is taught.
    """

    random: Random
    split: Split | None
    knows_columns: bool = True

    def item(self, task: Task) -> ViewItem:
        """Draw one item of a task."""
        if task is Task.COLUMN:
            column = self.random.randrange(NUM_COLUMNS)
            word = COLUMN_WORDS[column]
            return ViewItem(task, f"col {word}=", str(column), Owner.COLUMN, Owner.COLUMN, column=column)
        skewed = task is Task.SKEW
        column = self.random.choices(range(NUM_COLUMNS), COLUMN_PERCENT if skewed else None)[0]
        row = self.random.choices(range(NUM_ROWS), ROW_PERCENT if skewed else None)[0]
        key = self.random.choice(_keys(self.split, row))
        if task is Task.ROW:
            return ViewItem(task, f"row {key}=", str(row), Owner.ROW, Owner.ROW, key, row)
        word = COLUMN_WORDS[column] if self.knows_columns else self.random.choice(COLUMN_WORDS)
        letter = BOARD[row * NUM_COLUMNS + column]
        return ViewItem(task, f"{task} {key} {word}=", letter, Owner.BOTH, Owner.ROW, key, row, column)


def row_of(key: str) -> int:
    """Row of a key: dealt by a hash, so that it can only be known by heart."""
    return _rows()[key]


def view_items(
    split: Split, per_task: int, seed: int = 0, tasks: Iterable[Task] = tuple(Task)
) -> list[ViewItem]:
    """`per_task` items of each task; every task draws from a stream of its own."""
    items: list[ViewItem] = []
    for task in tasks:
        views = Views(Random(f"views/{split}/{seed}/{task}"), split)
        items.extend(views.item(task) for _ in range(per_task))
    return items


@cache
def _keys(split: Split | None, row: int) -> str:
    possible = KEY_CHARACTERS if split is None else _dealt(split)
    return "".join(key for key in possible if _rows()[key] == row)


@cache
def _rows() -> dict[str, int]:
    """Row of each key: half of each split's are in either row."""
    rows: dict[str, int] = {}
    for split in Split:
        dealt = _shuffled("row", _dealt(split))
        rows |= {key: number * NUM_ROWS // len(dealt) for number, key in enumerate(dealt)}
    return rows


def _dealt(split: Split) -> str:
    dealt, index = _shuffled("split", KEY_CHARACTERS), list(Split).index(split)
    first, last = (round(sum(SPLIT_SHARES[:end]) * len(dealt)) for end in (index, index + 1))
    return dealt[first:last]


def _shuffled(purpose: str, characters: str) -> str:
    return "".join(
        sorted(characters, key=lambda each: hashlib.sha256(f"{purpose} {each}".encode()).hexdigest())
    )
