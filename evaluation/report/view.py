"""Findings as a report looks at them: by measure, system and stratum, and which strata stand side by side."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace
from functools import cached_property

from evaluation.findings import ALL, SCORE, Cell, Comparison, Findings, SystemNote
from evaluation.report.measures import LOOKS, Look, look_of
from evaluation.statistics.intervals import Estimate

MOST_COLUMNS = 4
"""Parts of a division that still stand side by side."""
NOT_IN_COMPETITION = "forced"
"""Kind of the systems that read gold prefixes: no answer of their own, so never the best."""


@dataclass(frozen=True, slots=True)
class Columns:
    """Strata that stand side by side.

    Attributes:
        name: of the division; "" where questions are not divided.
        strata: its parts that have numbers, the whole among them in the first of a report's columns.
    """

    name: str
    strata: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class View:
    """Findings with what a report asks of them.

    What is asked about cells and comparisons is meant of one measure: of findings with several, ask each of
    `by_measure`.
    """

    findings: Findings

    @cached_property
    def by_measure(self) -> tuple[View, ...]:
        """One for each measure that there are numbers of: its cells and comparisons, and nothing of routing.

        Raises:
            InvalidRequest: a measure is not known.
        """
        known = {look_of(each.measure) for group in self._measured for each in group}
        return tuple(View(self._of(look.measure)) for look in LOOKS if look in known)

    @cached_property
    def look(self) -> Look:
        """How its measure is told; that of scores where there are no numbers."""
        return look_of(next((each.measure for group in self._measured for each in group), SCORE))

    @cached_property
    def systems(self) -> tuple[SystemNote, ...]:
        """Those with numbers, in the order to show."""
        known = {system for system, _ in self._cells}
        return tuple(note for note in self.findings.systems if note.name in known)

    @cached_property
    def narrow(self) -> tuple[Columns, ...]:
        """The divisions of few parts; the first has the whole at its end. Always at least one."""
        groups = [
            Columns(name, strata)
            for name, strata in self._divisions
            if 0 < len(strata) <= MOST_COLUMNS and set(strata) & self._strata
        ]
        if not groups:
            return (Columns("", (ALL,)),) if ALL in self._strata else ()
        if ALL in self._strata:
            groups[0] = Columns(groups[0].name, (*groups[0].strata, ALL))
        return tuple(groups)

    @cached_property
    def wide(self) -> tuple[Columns, ...]:
        """The divisions of many parts."""
        return tuple(Columns(name, strata) for name, strata in self._divisions if len(strata) > MOST_COLUMNS)

    @cached_property
    def seeds(self) -> tuple[int, ...]:
        """All training seeds, in order."""
        return tuple(sorted({seed for cell in self.findings.cells for seed in cell.per_seed}))

    @cached_property
    def baseline(self) -> str:
        """The system that the others are compared with; "" without comparisons."""
        if self.findings.baseline:
            return self.findings.baseline
        pairs = {frozenset((each.first, each.second)) for each in self.findings.comparisons}
        counts = Counter(name for pair in pairs for name in pair)
        order = [note.name for note in self.findings.systems]
        return max(order, key=lambda name: counts[name]) if counts and order else ""

    def label(self, system: str) -> str:
        """For people; the name of a system that nothing is said about."""
        return self._labels.get(system) or system

    def cell(self, system: str, stratum: str) -> Cell | None:
        """None where the system was not asked."""
        return self._cells.get((system, stratum))

    def comparison(self, first: str, second: str, stratum: str) -> Comparison | None:
        """First minus second, whichever way round it was made; None where it was not."""
        found = self._comparisons.get((first, second, stratum))
        if found is None and (turned := self._comparisons.get((second, first, stratum))):
            return turned_round(turned)
        return found

    def best(self, stratum: str) -> str | None:
        """The system whose difference to the runner-up is significant; None where none is that good."""
        cells = [
            cell
            for note in self.systems
            if note.kind != NOT_IN_COMPETITION and (cell := self.cell(note.name, stratum))
        ]
        if len(cells) < 2:
            return None
        sign = 1.0 if self.look.is_less_better else -1.0
        first, second, *_ = sorted(cells, key=lambda cell: sign * cell.estimate.value)
        against = self.comparison(first.system, second.system, stratum)
        is_better = (
            against is not None and against.is_significant and self.look.is_better(against.difference.value)
        )
        return first.system if is_better else None

    def num_questions(self, stratum: str) -> str:
        """Of each seed: "300", or "100 to 300" where systems were asked differently."""
        return numbered({cell.num_questions for cell in self.findings.cells if cell.stratum == stratum})

    def sorted_strata(self, strata: Iterable[str]) -> list[str]:
        """In the order of the divisions, the whole first."""
        order = [ALL, *(stratum for _, group in self._divisions for stratum in group)]
        places = {stratum: place for place, stratum in enumerate(order)}
        return sorted(set(strata), key=lambda stratum: (places.get(stratum, len(places)), stratum))

    @property
    def _measured(self) -> tuple[tuple[Cell, ...] | tuple[Comparison, ...], ...]:
        return self.findings.cells, self.findings.comparisons

    def _of(self, measure: str) -> Findings:
        return replace(
            self.findings,
            cells=tuple(each for each in self.findings.cells if each.measure == measure),
            comparisons=tuple(each for each in self.findings.comparisons if each.measure == measure),
            routing=(),
            entropies=(),
            overrulings=(),
            examples=(),
        )

    @cached_property
    def _divisions(self) -> list[tuple[str, tuple[str, ...]]]:
        return [
            (name, tuple(stratum for part in parts if (stratum := f"{name}={part}") in self._known_strata))
            for name, parts in self.findings.divisions.items()
        ]

    @cached_property
    def _known_strata(self) -> set[str]:
        found = self.findings
        others = (found.routing, found.entropies, found.overrulings, found.comparisons)
        return self._strata | {each.stratum for group in others for each in group}

    @cached_property
    def _strata(self) -> set[str]:
        return {cell.stratum for cell in self.findings.cells}

    @cached_property
    def _labels(self) -> dict[str, str]:
        return {note.name: note.label for note in self.findings.systems}

    @cached_property
    def _cells(self) -> dict[tuple[str, str], Cell]:
        return {(cell.system, cell.stratum): cell for cell in self.findings.cells}

    @cached_property
    def _comparisons(self) -> dict[tuple[str, str, str], Comparison]:
        return {(each.first, each.second, each.stratum): each for each in self.findings.comparisons}


def numbered(numbers: Collection[int]) -> str:
    """ "300", or "100 to 300"; "" for none."""
    if len(set(numbers)) < 2:
        return "".join(f"{number:,}" for number in set(numbers))
    return f"{min(numbers):,} to {max(numbers):,}"


def part_of(stratum: str) -> str:
    """What a stratum is called where its division is named already: "gap" of "coverage=gap"."""
    return stratum.partition("=")[2] or stratum


def turned_round(comparison: Comparison) -> Comparison:
    """Second minus first."""
    return replace(
        comparison,
        first=comparison.second,
        second=comparison.first,
        difference=_negated(comparison.difference),
        over_seeds=comparison.over_seeds and _negated(comparison.over_seeds),
        mixed=comparison.mixed and _negated(comparison.mixed),
        only_first=comparison.only_second,
        only_second=comparison.only_first,
        per_seed={seed: -value for seed, value in comparison.per_seed.items()},
    )


def _negated(estimate: Estimate) -> Estimate:
    return Estimate(-estimate.value, -estimate.high, -estimate.low)
