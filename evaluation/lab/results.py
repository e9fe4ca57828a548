"""From what the lab's models were heard to say to findings: cells, comparisons, who took part, who overruled whom."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np

from evaluation.findings import (
    ALL,
    Comparison,
    Findings,
    Overruling,
    RoutingEntropy,
    RoutingShare,
    SystemNote,
    TracedAnswer,
)
from evaluation.lab.plan import CDPO, SFT, LabPlan
from evaluation.lab.summary import LIMITS, summary_of
from evaluation.lab.systems import FUSIONROUTE, SeedRecords, systems_of
from evaluation.questions import Outcome, Question
from evaluation.statistics.cells import cells
from evaluation.statistics.comparing import compare
from evaluation.systems.ways import GATED, ROUTING_ONLY, SUM, expert_ways, fixed_ways
from evaluation.tasks.lab import DIVISIONS
from fusionroute.lab.tasks import TASKS

HELD_OUT = (
    ALL,
    *(f"{division}={part}" for division in ("coverage", "group") for part in DIVISIONS[division]),
)
SEEN = tuple(f"seen={part}" for part in DIVISIONS["coverage"])
COMPARED = (ALL, "coverage=covered", "coverage=gap")
ENTROPY_BINS = 20
TASK_STRATA = tuple(f"task={task}" for task in TASKS)
BOLD_PAIRS = (
    *((f"{SFT}/{rule.name}", f"{SFT}/{ROUTING_ONLY.name}") for rule in (SUM, *GATED)),
    *((f"{CDPO}/{rule.name}", f"{SFT}/{rule.name}") for rule in (SUM, *GATED)),
)
"""Pairs beside those with FusionRoute: what the complement adds, and what phase II does to each rule."""


@dataclass(frozen=True, slots=True)
class Gathered:
    """Everybody's outcomes, by what is done with them.

    Attributes:
        notes: of the systems, in the order of the tables.
        held_out, seen: outcomes on questions with such payloads, of systems that answered all of them.
        partial: on held-out questions, of systems that answered some only.
    """

    notes: tuple[SystemNote, ...]
    held_out: Sequence[Outcome]
    seen: Sequence[Outcome]
    partial: Sequence[Outcome]

    def on_seen(self, names: Sequence[str]) -> list[str]:
        """Those of the systems that were asked about seen payloads too."""
        asked = {outcome.system for outcome in self.seen}
        return [name for name in names if name in asked]

    def outcomes(self) -> Iterator[Outcome]:
        """All of them."""
        return chain(self.held_out, self.seen, self.partial)


def findings_of(
    plan: LabPlan,
    questions: Sequence[Question],
    seeds: Sequence[SeedRecords],
    gathered: Gathered,
    examples: Sequence[TracedAnswer],
    facts: Mapping[str, object],
) -> Findings:
    """The whole report.

    Args:
        plan: what was asked.
        questions: all of them, held-out ones and seen ones.
        seeds: what was heard, at least one.
        gathered: what `gather` makes of it.
        examples: answers token by token, to be drawn.
        facts: what decides the outcome besides the plan.
    """
    whole = [note.name for note in gathered.notes if not _is_partial(gathered, note.name)]
    some = [note.name for note in gathered.notes if _is_partial(gathered, note.name)]
    found = cells(gathered.held_out, whole, (*HELD_OUT, *TASK_STRATA))
    if gathered.seen:
        found += cells(gathered.seen, gathered.on_seen(whole), SEEN)
    if some:
        found += cells(gathered.partial, some, HELD_OUT)
    comparisons = _comparisons(gathered, whole, some)
    order = [note.name for note in gathered.notes]
    ordered = sorted(found, key=lambda cell: order.index(cell.system))
    return Findings(
        name=plan.name,
        summary=summary_of(ordered, comparisons, gathered.notes),
        limits=LIMITS,
        systems=gathered.notes,
        divisions={
            "coverage": DIVISIONS["coverage"],
            "group": DIVISIONS["group"],
            **({"seen": DIVISIONS["coverage"]} if gathered.seen else {}),
            "task": tuple(TASKS),
        },
        cells=tuple(ordered),
        comparisons=tuple(comparisons),
        routing=tuple(routing_of(seeds, questions)),
        examples=tuple(examples),
        slots=seeds[0].slots,
        facts={"plan": plan.to_json(), **facts},
        entropies=tuple(entropies_of(seeds, questions)),
        overrulings=tuple(overrulings_of(seeds, questions)),
        baseline=FUSIONROUTE if FUSIONROUTE in order else "",
    )


def gather(questions: Sequence[Question], seeds: Sequence[SeedRecords]) -> Gathered:
    """Every system's outcomes of every seed."""
    by_id = {question.id: question for question in questions}
    num_held_out = sum("coverage" in question.strata for question in questions)
    notes: dict[str, SystemNote] = {}
    held_out: list[Outcome] = []
    seen: list[Outcome] = []
    partial: list[Outcome] = []
    for records in seeds:
        for system in systems_of(records, by_id):
            notes.setdefault(system.note.name, system.note)
            own = list(system.outcomes(by_id, records.seed))
            mine = [each for each in own if "coverage" in each.question.strata]
            (held_out if len(mine) == num_held_out else partial).extend(mine)
            seen.extend(each for each in own if "seen" in each.question.strata)
    return Gathered(tuple(notes.values()), held_out, seen, partial)


def routing_of(seeds: Sequence[SeedRecords], questions: Sequence[Question]) -> Iterator[RoutingShare]:
    """Who took part in the tokens of the held-out gold answers, by group of tasks."""
    for checkpoint, way in _drawn_ways(seeds):
        for stratum, ids in _by_stratum(questions, ("group",)).items():
            counts: Counter[str] = Counter()
            for records in seeds:
                judged = records.routers[checkpoint]
                for id_ in ids:
                    counts.update(judged[id_].opinions[way].experts)
            total = sum(counts.values())
            shares = {slot: counts[slot] / total for slot in (*seeds[0].slots, "")}
            yield RoutingShare(f"{checkpoint}/{way}", stratum, total, shares)


def entropies_of(seeds: Sequence[SeedRecords], questions: Sequence[Question]) -> Iterator[RoutingEntropy]:
    """How undecided routing was at the tokens of the answers that were written."""
    for system in (f"{SFT}/{ROUTING_ONLY.name}", f"{SFT}/{SUM.name}", f"{CDPO}/{SUM.name}"):
        for stratum, ids in _by_stratum(questions, ("group",)).items():
            found = [
                value
                for records in seeds
                for id_ in ids
                for value in records.entropies.get(system, {}).get(id_, ())
            ]
            if found:
                most = math.log(len(seeds[0].slots))
                counts, _ = np.histogram(np.clip(found, 0.0, most), bins=ENTROPY_BINS, range=(0.0, most))
                mean = sum(found) / len(found)
                yield RoutingEntropy(system, stratum, most, tuple(map(int, counts)), mean)


def overrulings_of(seeds: Sequence[SeedRecords], questions: Sequence[Question]) -> Iterator[Overruling]:
    """Where the complement chose otherwise than the expert, along the held-out gold answers."""
    slots = seeds[0].slots
    alone = {slot: way.name for slot, way in zip(slots, expert_ways(slots), strict=True)}
    for checkpoint, way in _drawn_ways(seeds):
        if way == ROUTING_ONLY.name:
            continue
        for stratum, ids in _by_stratum(questions, ("coverage", "group")).items():
            counts: Counter[str] = Counter()
            for records in seeds:
                judged, experts = records.routers[checkpoint], records.routers[SFT]
                for id_ in ids:
                    merged = judged[id_].with_opinions_of(experts[id_])
                    for choice in merged.overruled(way, alone):
                        counts.update(["all", *choice.kinds])
            yield Overruling(
                f"{checkpoint}/{way}",
                stratum,
                num_tokens=counts["all"],
                num_overruled=counts["overruled"],
                num_mended=counts["mended"],
                num_spoiled=counts["spoiled"],
                num_neither=counts["neither"],
            )


def _comparisons(gathered: Gathered, whole: Sequence[str], some: Sequence[str]) -> list[Comparison]:
    if FUSIONROUTE not in whole:
        return []
    pairs = [(FUSIONROUTE, name) for name in whole if name != FUSIONROUTE]
    pairs += [pair for pair in BOLD_PAIRS if set(pair) <= set(whole) and pair not in pairs]
    found = compare(gathered.held_out, pairs, COMPARED)
    if gathered.seen:
        with_ours = [(FUSIONROUTE, name) for name in gathered.on_seen(whole) if name != FUSIONROUTE]
        found += compare(gathered.seen, with_ours, SEEN)
    for name in some:
        asked = {(each.seed, each.question.id) for each in gathered.partial if each.system == name}
        own = [each for each in gathered.partial if each.system == name]
        ours = [
            each
            for each in gathered.held_out
            if each.system == FUSIONROUTE and (each.seed, each.question.id) in asked
        ]
        found += compare([*own, *ours], [(FUSIONROUTE, name)], COMPARED)
    return found


def _is_partial(gathered: Gathered, name: str) -> bool:
    return any(each.system == name for each in gathered.partial)


def _drawn_ways(seeds: Sequence[SeedRecords]) -> Iterator[tuple[str, str]]:
    """(checkpoint, way) of the ways in which routing is of interest."""
    fixed = {way.name for way in fixed_ways(seeds[0].slots)}
    for checkpoint in (SFT, CDPO):
        if checkpoint not in seeds[0].routers:
            continue
        heard = next(iter(seeds[0].routers[checkpoint].values())).opinions
        for way in (ROUTING_ONLY, SUM, *GATED):
            if way.name in heard and way.name not in fixed:
                yield checkpoint, way.name


def _by_stratum(questions: Iterable[Question], divisions: Sequence[str]) -> dict[str, list[str]]:
    """Ids of held-out questions."""
    found: dict[str, list[str]] = {ALL: []}
    for question in questions:
        if "coverage" in question.strata:
            found[ALL].append(question.id)
            for division in divisions:
                found.setdefault(f"{division}={question.strata[division]}", []).append(question.id)
    return found
