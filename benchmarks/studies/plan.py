"""The words in which a study is written: routers to be trained, levels on the x axis, panels to look at."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from evaluation.questions import Question
from fusionroute.sampling import Sampling
from trainer.lab_family.recipe import EXPERT_SLOTS

GREEDY = Sampling()

Switches = Mapping[str, Any]
"""Tables of a job's configuration that differ from the recipe's."""


@dataclass(frozen=True)
class Sft:
    """A router of phase I.

    Attributes:
        experts: names of `experts`, in the order of the heads.
        num_items: gold answers it learns from; None = as many as the recipe says. Steps stay as they are.
        gap_share: share of them that are gap tasks; None = all tasks alike (6 of 23).
        switches: of the `SftJob`.
    """

    experts: tuple[str, ...] = EXPERT_SLOTS
    num_items: int | None = None
    gap_share: float | None = None
    switches: Switches = field(default_factory=dict)


@dataclass(frozen=True)
class Cdpo:
    """A router of phase II, made from one of phase I by pairs of that one's own mistakes.

    Attributes:
        switches: of the `CdpoJob`.
    """

    of: Sft = Sft()
    switches: Switches = field(default_factory=dict)


@dataclass(frozen=True)
class Extended:
    """A router that was given one more expert by `train extend`.

    Attributes:
        expert: the new one; it learns from the gold answers of the tasks that need it.
        replays: whether the gold answers of the other tasks are given as `old_data`.
    """

    of: Sft | Cdpo
    expert: str = "math"
    replays: bool = True


Router = Sft | Cdpo | Extended


def experts_of(router: Router) -> tuple[str, ...]:
    """Names of its experts in the order of its heads."""
    if isinstance(router, Sft):
        return router.experts
    before = experts_of(router.of)
    return (*before, router.expert) if isinstance(router, Extended) else before


def digest_of(router: Router) -> str:
    """12 hexadecimal digits that tell one router from another."""
    text = json.dumps([type(router).__name__, asdict(router)], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


@dataclass(frozen=True)
class Level:
    """One value of what varies.

    Attributes:
        name: of the level, for programs; a system is LEVEL/PHASE/RULE.
        label: on the x axis.
        phases: routers by name of the phase, for example "sft" and "cdpo".
        experts: who serves instead of whom, by the name of the one trained with: a corrupted one.
        drawing: how answers come to be.
    """

    name: str
    label: str
    phases: Mapping[str, Router]
    experts: Mapping[str, str] = field(default_factory=dict)
    drawing: Sampling = GREEDY


@dataclass(frozen=True)
class Panel:
    """One plot: what varies against the share of right answers in a stratum.

    Attributes:
        stratum: "DIVISION=PART".
        levels: names on the x axis, in this order.
        axis: what varies, with its unit.
    """

    title: str
    stratum: str
    levels: tuple[str, ...]
    axis: str


@dataclass(frozen=True)
class Study:
    """One question to the lab.

    Attributes:
        name: of its files.
        title: a line for people.
        question: what it asks, in a sentence or two.
        levels: everything that is trained and judged.
        lines: "PHASE/RULE" that every level is judged by where it has the phase, in the order of the legend.
        panels: the picture's plots; strata of tables and comparisons.
        baseline: by panel title the level that others are compared with; "" = the first of the panel.
        rivals: pairs of lines that are compared at every level too.
        divide: further divisions of a question.
    """

    name: str
    title: str
    question: str
    levels: tuple[Level, ...]
    lines: tuple[str, ...]
    panels: tuple[Panel, ...]
    baseline: str
    rivals: tuple[tuple[str, str], ...] = ()
    divide: Callable[[Question], Mapping[str, str]] = lambda question: {}

    def level(self, name: str) -> Level:
        """The level of this name."""
        return next(level for level in self.levels if level.name == name)
