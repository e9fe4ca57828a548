"""What each stage reads: items as padded token rows, with a mask of the tokens that carry loss."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from random import Random

import numpy as np
from numpy.typing import NDArray

from fusionroute.lab.tasks import (
    COMPOSITE_TASKS,
    DOMAIN_TASKS,
    JUNK_LETTERS,
    TASKS,
    Group,
    Item,
    Owner,
    Payloads,
    Split,
    make_item,
)
from fusionroute.lab.tokenizer import EOS_ID, PAD_ID, encode

BASE_DOMAIN_SHARE = 0.8
PLAIN_SHARE = {Owner.MATH: 0.6, Owner.STRINGS: 0.6, Owner.FORMAT: 0.5}
JUNK_SHARE = 0.35

ALL_OWNERS = frozenset(Owner)


@dataclass(frozen=True, slots=True)
class Row:
    """One training example: its token ids and which of them carry loss."""

    ids: list[int]
    supervised: list[bool]


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows of one stage, padded on the right.

    Attributes:
        ids: ``[N, L]`` int64.
        supervised: ``[N, L]`` bool, True where the token itself is to be predicted (by the position before
            it).
        lengths: ``[N]`` int64, tokens of each row without padding.
    """

    ids: NDArray[np.int64]
    supervised: NDArray[np.bool_]
    lengths: NDArray[np.int64]


def written(item: Item, owners: frozenset[Owner] = ALL_OWNERS, *, eos: bool = True) -> Row:
    """An item as a row; only the answer's tokens of these owners carry loss, and the end where `eos`."""
    prompt = encode(item.prompt)
    by_owner = [owner in owners for owner in item.owners]
    ends = eos and item.eos_owner in owners
    ids = [*prompt, *encode(item.answer), EOS_ID]
    return Row(ids, [*[False] * len(prompt), *by_owner, ends])


def base_row(random: Random) -> Row:
    """80 % domain and 20 % composite tasks, every token of the answer supervised."""
    group = Group.DOMAIN if random.random() < BASE_DOMAIN_SHARE else Group.COMPOSITE
    return written(make_item(random.choice(_tasks_of(group)), Payloads(random, Split.TRAIN)))


def expert_row(owner: Owner, random: Random) -> Row:
    """Plain items of the expert's domain, and composites in which only its own tokens carry loss.

    The math expert alone sees every number fact. Math and strings see some plain items beside a junk word,
    without
    learning that the answer ends: this makes them robust to foreign context.
    """
    payloads = Payloads(random, Split.TRAIN, all_facts=owner is Owner.MATH)
    if random.random() >= PLAIN_SHARE[owner]:
        return written(make_item(random.choice(COMPOSITE_TASKS[owner]), payloads), frozenset({owner}))
    item = make_item(random.choice(DOMAIN_TASKS[owner]), payloads)
    if owner is Owner.FORMAT or random.random() >= JUNK_SHARE:
        return written(item, frozenset({owner}))
    return written(_with_junk(item, random), frozenset({owner}), eos=False)


def router_row(random: Random) -> Row:
    """A gold answer of any of the 23 tasks, every token of it supervised."""
    return written(make_item(random.choice(tuple(TASKS)), Payloads(random, Split.TRAIN)))


def stream(make: Callable[[Random], Row], num_rows: int, name: str) -> Rows:
    """`num_rows` fresh rows; the same ones for the same name."""
    random = Random(name)  # noqa: S311 - not for secrets
    return padded([make(random) for _ in range(num_rows)])


def padded(rows: Iterable[Row]) -> Rows:
    """Rows of one length, padded on the right with tokens that carry no loss."""
    kept = list(rows)
    lengths = np.array([len(row.ids) for row in kept], dtype=np.int64)
    ids = np.full((len(kept), int(lengths.max())), PAD_ID, dtype=np.int64)
    supervised = np.zeros(ids.shape, dtype=np.bool_)
    filled = np.arange(ids.shape[1])[None, :] < lengths[:, None]
    ids[filled] = np.concatenate([row.ids for row in kept])
    supervised[filled] = np.concatenate([row.supervised for row in kept])
    return Rows(ids, supervised, lengths)


def _tasks_of(group: Group) -> list[str]:
    return [name for name, its_group in TASKS.items() if its_group is group]


def _with_junk(item: Item, random: Random) -> Item:
    junk = "".join(random.choices(JUNK_LETTERS, k=random.randint(2, 5)))
    question = item.prompt.removesuffix("=")
    prompt = f"{junk} {question}=" if random.random() < 0.5 else f"{question} {junk}="
    return Item(item.task, item.group, prompt, item.answer, item.owners, item.eos_owner)
