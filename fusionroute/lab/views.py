"""Tasks beside the lab's whose answer nobody knows alone: an expert knows its row of a board, the router its column.

            red blue green gold        even k7 blue=f      row of the key k7: the expert alone knows it
    row 0    a   b    c     d          skew k7 blue=f      column of the word blue: the router's data alone tell it
    row 1    e   f    g     h          row k7=1            covered: the expert's half by itself
    row 2    i   j    k     l          col blue=1          gap: the router's half by itself
    row 3    m   n    o     p

Of the letter each knows four candidates, and no way to tell them apart but how often each is right. In ``even`` all
are equally frequent; in ``skew`` row 0 and column 0 are right in 55 % of all cases, the others in less than 20 % each.
Where neither row nor column is the frequent one, the right letter is the first choice of no model, and of no mixture of
the two either (0.19 < 0.55 / 2), while the product of both distributions has its maximum there. In ``even`` a mixture
has its maximum there too: equal halves add up.

A key is two characters, each of which stands for one bit of the row: nothing but hearing of it tells which. The
characters are dealt to three splits: the router learns from the keys of one, gates may be fitted on those of another,
which no router has met, and the third is for testing.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from functools import cache
from random import Random

BOARD = "abcdefghijklmnop"
NUM_ROWS = NUM_COLUMNS = 4
COLUMN_WORDS = ("red", "blue", "green", "gold")
COLUMN_PERCENT = (55, 15, 15, 15)
"""How often each column is right in `skew`."""
KEY_CHARACTERS = "abcdefghijklmnopqrstuvwxyz0123456789ABCDEFGHIJ"
SPLIT_SHARES = (0.44, 0.28, 0.28)
"""Share of the characters that keys of each split are made of, in the order of `Split`."""
BIT_PERCENT = (74, 26)
"""How often each bit of a row is asked for in `skew`: 0.74 ** 2 is 0.55."""


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
        bits = self.random.choices((0, 1), BIT_PERCENT if skewed else None, k=2)
        key = "".join(
            self.random.choice(_characters(place, self.split, bit)) for place, bit in enumerate(bits)
        )
        row = row_of(key)
        if task is Task.ROW:
            return ViewItem(task, f"row {key}=", str(row), Owner.ROW, Owner.ROW, key, row)
        word = COLUMN_WORDS[column] if self.knows_columns else self.random.choice(COLUMN_WORDS)
        letter = BOARD[row * NUM_COLUMNS + column]
        return ViewItem(task, f"{task} {key} {word}=", letter, Owner.BOTH, Owner.ROW, key, row, column)


def row_of(key: str) -> int:
    """Row of a key of two characters: dealt by a hash of each, so that it can only be known by heart."""
    first, second = (_bits(place)[character] for place, character in enumerate(key))
    return 2 * first + second


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
def _characters(place: int, split: Split | None, bit: int) -> str:
    """What may stand at a place of a key, for one bit of its row."""
    possible = KEY_CHARACTERS if split is None else _dealt(place, split)
    return "".join(character for character in possible if _bits(place)[character] == bit)


@cache
def _bits(place: int) -> dict[str, int]:
    """What each character stands for: half of each split's for either bit."""
    bits: dict[str, int] = {}
    for split in Split:
        dealt = _shuffled(f"bit {place}", _dealt(place, split))
        bits |= {character: int(2 * number >= len(dealt)) for number, character in enumerate(dealt)}
    return bits


def _dealt(place: int, split: Split) -> str:
    dealt, index = _shuffled(f"split {place}", KEY_CHARACTERS), list(Split).index(split)
    first, last = (round(sum(SPLIT_SHARES[:end]) * len(dealt)) for end in (index, index + 1))
    return dealt[first:last]


def _shuffled(purpose: str, characters: str) -> str:
    return "".join(
        sorted(characters, key=lambda each: hashlib.sha256(f"{purpose} {each}".encode()).hexdigest())
    )
