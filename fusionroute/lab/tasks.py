"""The lab's task grammar: 23 tiny tasks whose every answer character has an owner.

A prompt ends with ``=`` and the answer follows it. An answer is written by one or several owners: ``m``
knows number facts, ``s`` knows string operations, ``f`` knows formats, and ``g`` stands for nobody
("gap"): what no expert was taught and only the router can add.

    group      tasks                                               example
    domain     add sub mul | rev sort up | fbox fans ftwo          13-8=5    rev jahe=ehaj    box: x9x=[x9x]
    composite  box/ans/two with m or s inside, ms, box_ms          box: 4+4; rev jbef=[8; febj]
    gap        unit box_unit pls_m pls_s fact ans_fact             9-3 kg=6 kg   pls 4+3=7, ok?   month 5=may

Some payloads are held out by their CRC: 40 % of the 192 number facts and 20 % of all strings are for
testing only. The day and month facts are few and cannot be held out.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import StrEnum
from functools import cache
from random import Random

HELD_OUT_FACTS_PERCENT = 40
HELD_OUT_STRINGS_PERCENT = 20

STRING_LETTERS = "abcdefghij"
JUNK_LETTERS = "klmnopqrstuvwxyz"
WORD_CHARACTERS = "abcdefghijklmnopqrstuvwxyz0123456789"
DAYS = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")
MONTHS = ("jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec")


class Owner(StrEnum):
    """Who knows a character of an answer."""

    MATH = "m"
    STRINGS = "s"
    FORMAT = "f"
    NOBODY = "g"


class Group(StrEnum):
    """Whether one expert, several experts or no set of experts covers a task."""

    DOMAIN = "domain"
    COMPOSITE = "composite"
    GAP = "gap"


class Split(StrEnum):
    """Which payloads may occur."""

    TRAIN = "train"
    TEST = "test"


@dataclass(frozen=True, slots=True)
class Item:
    """One prompt with its only right answer.

    Attributes:
        task: name of the task, a key of `TASKS`.
        group: the task's group.
        prompt: text that ends with ``=``.
        answer: text that follows, without the end-of-sequence token.
        owners: one `Owner` letter for each character of the answer.
        eos_owner: who knows that the answer ends there.
    """

    task: str
    group: Group
    prompt: str
    answer: str
    owners: str
    eos_owner: Owner


@dataclass(frozen=True, slots=True)
class Payloads:
    """A source of number facts and strings that keeps to one split.

    With `all_facts` the facts of both splits occur: this is what only the math expert sees.
    """

    random: Random
    split: Split
    all_facts: bool = False

    def fact(self, operation: str | None = None) -> tuple[str, str]:
        """A number fact such as ``("13-8", "5")``; of one operation (``+``, ``-``, ``*``) or of any."""
        return self.random.choice(_facts(None if self.all_facts else self.split, operation))

    def letters(self) -> str:
        """Four letters for a string operation."""
        return self._kept(lambda: "".join(self.random.choices(STRING_LETTERS, k=4)))

    def word(self) -> str:
        """A literal word of two to five letters and digits."""
        return self._kept(lambda: "".join(self.random.choices(WORD_CHARACTERS, k=self.random.randint(2, 5))))

    def _kept(self, draw: Callable[[], str]) -> str:
        while held_out(text := draw(), HELD_OUT_STRINGS_PERCENT) != (self.split is Split.TEST):
            pass
        return text


Span = tuple[str, Owner]
Made = tuple[str, list[Span], Owner]


def held_out(payload: str, percent: int) -> bool:
    """Whether a payload is for testing only."""
    return zlib.crc32(payload.encode()) % 100 < percent


@cache
def number_facts() -> tuple[tuple[str, str], ...]:
    """All 192 number facts: sums, differences and products of 2 to 9."""
    numbers = range(2, 10)
    pairs = [(a, b) for a in numbers for b in numbers]
    sums = [(f"{a}+{b}", str(a + b)) for a, b in pairs]
    differences = [(f"{a + b}-{a}", str(b)) for a, b in pairs]
    products = [(f"{a}*{b}", str(a * b)) for a, b in pairs]
    return (*sums, *differences, *products)


@cache
def _facts(split: Split | None, operation: str | None) -> tuple[tuple[str, str], ...]:
    return tuple(
        (payload, answer)
        for payload, answer in number_facts()
        if (operation is None or operation in payload)
        and (split is None or held_out(f"fact {payload}", HELD_OUT_FACTS_PERCENT) == (split is Split.TEST))
    )


def _math(payloads: Payloads) -> tuple[str, list[Span]]:
    payload, answer = payloads.fact(payloads.random.choice("+-*"))
    return payload, [(answer, Owner.MATH)]


def _apply(operation: str, letters: str) -> str:
    if operation == "rev":
        return letters[::-1]
    return letters.upper() if operation == "up" else "".join(sorted(letters))


def _strings(payloads: Payloads) -> tuple[str, list[Span]]:
    operation, letters = payloads.random.choice(("rev", "sort", "up")), payloads.letters()
    return f"{operation} {letters}", [(_apply(operation, letters), Owner.STRINGS)]


def _both(payloads: Payloads) -> tuple[str, list[Span]]:
    math_prompt, math_answer = _math(payloads)
    strings_prompt, strings_answer = _strings(payloads)
    return f"{math_prompt}; {strings_prompt}", [*math_answer, ("; ", Owner.FORMAT), *strings_answer]


def _unit(payloads: Payloads) -> tuple[str, list[Span]]:
    prompt, answer = _math(payloads)
    return f"{prompt} kg", [*answer, (" kg", Owner.NOBODY)]


def _calendar(payloads: Payloads) -> tuple[str, list[Span]]:
    kind, names = payloads.random.choice((("day", DAYS), ("month", MONTHS)))
    number = payloads.random.randrange(len(names))
    return f"{kind} {number + 1}", [(names[number], Owner.NOBODY)]


def _word(payloads: Payloads) -> tuple[str, list[Span]]:
    word = payloads.word()
    return word, [(word, Owner.FORMAT)]


Inner = Callable[[Payloads], tuple[str, list[Span]]]
Maker = Callable[[Payloads], Made]


def _plain(inner: Inner, eos_owner: Owner) -> Maker:
    def make(payloads: Payloads) -> Made:
        prompt, spans = inner(payloads)
        return f"{prompt}=", spans, eos_owner

    return make


def _formatted(style: str, inner: Inner) -> Maker:
    def make(payloads: Payloads) -> Made:
        prompt, spans = inner(payloads)
        if style == "box":
            written = [("[", Owner.FORMAT), *spans, ("]", Owner.FORMAT)]
        elif style == "ans":
            written = [("Answer: ", Owner.FORMAT), *spans, (".", Owner.FORMAT)]
        else:
            written = [*spans, (" ", Owner.FORMAT), *spans]
        return f"{style}: {prompt}=", written, Owner.FORMAT

    return make


def _polite(inner: Inner) -> Maker:
    def make(payloads: Payloads) -> Made:
        prompt, spans = inner(payloads)
        return f"pls {prompt}=", [*spans, (", ok?", Owner.NOBODY)], Owner.NOBODY

    return make


def _one_fact(operation: str) -> Maker:
    def make(payloads: Payloads) -> Made:
        payload, answer = payloads.fact(operation)
        return f"{payload}=", [(answer, Owner.MATH)], Owner.MATH

    return make


def _one_string_operation(operation: str) -> Maker:
    def make(payloads: Payloads) -> Made:
        letters = payloads.letters()
        return f"{operation} {letters}=", [(_apply(operation, letters), Owner.STRINGS)], Owner.STRINGS

    return make


_MAKERS: dict[str, tuple[Group, Maker]] = {
    "add": (Group.DOMAIN, _one_fact("+")),
    "sub": (Group.DOMAIN, _one_fact("-")),
    "mul": (Group.DOMAIN, _one_fact("*")),
    "rev": (Group.DOMAIN, _one_string_operation("rev")),
    "sort": (Group.DOMAIN, _one_string_operation("sort")),
    "up": (Group.DOMAIN, _one_string_operation("up")),
    "fbox": (Group.DOMAIN, _formatted("box", _word)),
    "fans": (Group.DOMAIN, _formatted("ans", _word)),
    "ftwo": (Group.DOMAIN, _formatted("two", _word)),
    "box_m": (Group.COMPOSITE, _formatted("box", _math)),
    "ans_m": (Group.COMPOSITE, _formatted("ans", _math)),
    "two_m": (Group.COMPOSITE, _formatted("two", _math)),
    "box_s": (Group.COMPOSITE, _formatted("box", _strings)),
    "ans_s": (Group.COMPOSITE, _formatted("ans", _strings)),
    "two_s": (Group.COMPOSITE, _formatted("two", _strings)),
    "ms": (Group.COMPOSITE, _plain(_both, Owner.FORMAT)),
    "box_ms": (Group.COMPOSITE, _formatted("box", _both)),
    "unit": (Group.GAP, _plain(_unit, Owner.NOBODY)),
    "box_unit": (Group.GAP, _formatted("box", _unit)),
    "pls_m": (Group.GAP, _polite(_math)),
    "pls_s": (Group.GAP, _polite(_strings)),
    "fact": (Group.GAP, _plain(_calendar, Owner.NOBODY)),
    "ans_fact": (Group.GAP, _formatted("ans", _calendar)),
}

TASKS: dict[str, Group] = {name: group for name, (group, _) in _MAKERS.items()}
DOMAIN_TASKS: dict[Owner, tuple[str, ...]] = {
    Owner.MATH: ("add", "sub", "mul"),
    Owner.STRINGS: ("rev", "sort", "up"),
    Owner.FORMAT: ("fbox", "fans", "ftwo"),
}
COMPOSITE_TASKS: dict[Owner, tuple[str, ...]] = {
    Owner.MATH: ("box_m", "ans_m", "two_m", "ms", "box_ms"),
    Owner.STRINGS: ("box_s", "ans_s", "two_s", "ms", "box_ms"),
    Owner.FORMAT: ("box_m", "ans_m", "two_m", "box_s", "ans_s", "two_s", "ms", "box_ms"),
}


def make_item(task: str, payloads: Payloads) -> Item:
    """Draw one item of a task.

    Raises:
        KeyError: no task has this name.
    """
    group, maker = _MAKERS[task]
    prompt, spans, eos_owner = maker(payloads)
    return Item(
        task=task,
        group=group,
        prompt=prompt,
        answer="".join(text for text, _ in spans),
        owners="".join(owner * len(text) for text, owner in spans),
        eos_owner=eos_owner,
    )


_FACT = re.compile(r"\d+[-+*]\d+|(?:day|month) \d+")


def fact_of(prompt: str) -> str | None:
    """The number or calendar fact that a prompt asks for; None where it asks for none."""
    found = _FACT.search(prompt)
    return found.group() if found else None


def evaluation_items(
    split: Split | str = Split.TEST,
    per_task: int = 40,
    seed: int = 0,
    tasks: Iterable[str] | None = None,
) -> list[Item]:
    """`per_task` items of each task (all 23 unless told), the same ones for the same arguments.

    Tasks with few payloads repeat them; every task draws from a stream of its own, so leaving a task out
    changes nothing for the others.
    """
    items: list[Item] = []
    for task in TASKS if tasks is None else tasks:
        payloads = Payloads(Random(f"evaluation/{split}/{seed}/{task}"), Split(split))
        items.extend(make_item(task, payloads) for _ in range(per_task))
    return items


def _written(task: str, prompt: str, *spans: Span, eos_owner: Owner = Owner.FORMAT) -> Item:
    answer = "".join(text for text, _ in spans)
    owners = "".join(owner * len(text) for text, owner in spans)
    return Item(task, TASKS[task], prompt, answer, owners, eos_owner)


def examples() -> list[Item]:
    """A handful of telling items for a demonstration: each group, and answers with one to three owners."""
    m, s, f, g = Owner.MATH, Owner.STRINGS, Owner.FORMAT, Owner.NOBODY
    return [
        _written("box_ms", "box: 4+4; rev jbef=", ("[", f), ("8", m), ("; ", f), ("febj", s), ("]", f)),
        _written("ans_s", "ans: sort agjf=", ("Answer: ", f), ("afgj", s), (".", f)),
        _written("two_m", "two: 13-8=", ("5", m), (" ", f), ("5", m)),
        _written("sub", "13-8=", ("5", m), eos_owner=m),
        _written("pls_m", "pls 4+3=", ("7", m), (", ok?", g), eos_owner=g),
        _written("pls_s", "pls sort cide=", ("cdei", s), (", ok?", g), eos_owner=g),
        _written("box_unit", "box: 11-3 kg=", ("[", f), ("8", m), (" kg", g), ("]", f)),
        _written("ans_fact", "ans: day 3=", ("Answer: ", f), ("wed", g), (".", f)),
    ]
