"""Intervals and comparisons of what a study has judged."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.studies.judging import ROUTER, Judge, Judged
from benchmarks.studies.plan import Panel, Study
from benchmarks.studies.workshop import Workshop
from evaluation.findings import Cell, Comparison
from evaluation.questions import Answer, Outcome, Question, Verdict
from evaluation.statistics.cells import cells
from evaluation.statistics.comparing import compare
from evaluation.statistics.significance import holm
from evaluation.tasks.lab import lab_questions
from fusionroute.lab.tasks import Split, evaluation_items
from trainer.lab_family.cache import digest_of_sources

Scores = Mapping[str, list[float]]
"""By system, LEVEL/PHASE/RULE, the score of each question."""


@dataclass(frozen=True, slots=True)
class Results:
    """What a study has found.

    Attributes:
        cells: every system in the strata of the panels it is in.
        comparisons: by panel; all of a study are one family for Holm.
        shares: by level and phase, then rule, then expert ("" the router): share of the tokens, mean of the seeds.
    """

    study: Study
    seeds: tuple[int, ...]
    per_task: int
    cells: tuple[Cell, ...]
    comparisons: Mapping[str, tuple[Comparison, ...]]
    shares: Mapping[str, Mapping[str, Mapping[str, float]]]

    def cell(self, level: str, line: str, stratum: str) -> Cell | None:
        """One of them, by its place in a table."""
        wanted = (f"{level}/{line}", stratum)
        return next((cell for cell in self.cells if (cell.system, cell.stratum) == wanted), None)


@dataclass(frozen=True, slots=True)
class SeedResults:
    """What a study has judged of one family."""

    scores: Scores
    shares: Mapping[str, Mapping[str, Mapping[str, float]]]


def judge_seed(study: Study, judge: Judge) -> SeedResults:
    """Every level's routers, trained where they are not there yet, on the judge's items."""
    scores: dict[str, list[float]] = {}
    shares: dict[str, Mapping[str, Mapping[str, float]]] = {}
    for level in study.levels:
        for phase, router in level.phases.items():
            found: Judged = judge.judged(router, level)
            for line in study.lines:
                of_phase, _, rule = line.partition("/")
                if of_phase == phase:
                    scores[f"{level.name}/{line}"] = found.scores[rule]
            shares[f"{level.name}/{phase}"] = found.shares
    return SeedResults(scores, shares)


def judge_of(workshop: Workshop, per_task: int) -> Judge:
    """The judge of a family, with held-out items."""
    return Judge(workshop, evaluation_items(Split.TEST, per_task))


def digest_of_judging(study: Study) -> str:
    """12 hexadecimal digits of everything that decides what is judged, beside family and items."""
    here = Path(__file__).parent
    code = digest_of_sources([here / f"{name}.py" for name in ("experts", "judging", "workshop")])
    levels = [asdict(level) for level in study.levels]
    text = json.dumps([levels, study.lines, code], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def results_of(study: Study, per_task: int, by_seed: Mapping[int, SeedResults]) -> Results:
    """All seeds together."""
    questions = [_divided(question, study) for question in lab_questions(per_task)]
    outcomes = [each for seed, found in by_seed.items() for each in _outcomes(questions, seed, found.scores)]
    by_stratum: dict[str, set[str]] = {}
    for panel in study.panels:
        by_stratum.setdefault(panel.stratum, set()).update(_systems(study, panel))
    found = [
        cell for stratum, names in by_stratum.items() for cell in cells(outcomes, sorted(names), [stratum])
    ]
    return Results(
        study,
        tuple(sorted(by_seed)),
        per_task,
        tuple(found),
        _compared(study, outcomes),
        _mean_shares([each.shares for each in by_seed.values()]),
    )


def _compared(study: Study, outcomes: Sequence[Outcome]) -> dict[str, tuple[Comparison, ...]]:
    """By panel title; all panels are one family for Holm."""
    found = {
        panel.title: compare(outcomes, pairs, [panel.stratum])
        for panel in study.panels
        if (pairs := _pairs(study, panel))
    }
    adjusted = iter(holm([each.p_value for panel in found.values() for each in panel]))
    return {
        title: tuple(dataclasses.replace(each, p_adjusted=next(adjusted)) for each in panel)
        for title, panel in found.items()
    }


def baseline_of(study: Study, panel: Panel) -> str:
    """The level that the panel's others are compared with."""
    return study.baseline or panel.levels[0]


def _pairs(study: Study, panel: Panel) -> list[tuple[str, str]]:
    """Levels with the baseline, by each line that fuses something, and rivals at each level."""
    baseline = baseline_of(study, panel)
    with_baseline = [
        (f"{level}/{line}", f"{baseline}/{line}")
        for line in study.lines
        for level in panel.levels
        if level != baseline
        and not line.endswith(f"/{ROUTER}")
        and _has(study, level, line)
        and _has(study, baseline, line)
    ]
    rivals = [
        (f"{level}/{first}", f"{level}/{second}")
        for first, second in study.rivals
        for level in panel.levels
        if _has(study, level, first) and _has(study, level, second)
    ]
    return [*with_baseline, *rivals]


def _systems(study: Study, panel: Panel) -> list[str]:
    return [f"{level}/{line}" for level in panel.levels for line in study.lines if _has(study, level, line)]


def _has(study: Study, level: str, line: str) -> bool:
    return line.partition("/")[0] in study.level(level).phases


def _divided(question: Question, study: Study) -> Question:
    return dataclasses.replace(question, strata={**question.strata, **study.divide(question)})


def _outcomes(questions: Sequence[Question], seed: int, scores: Scores) -> Iterable[Outcome]:
    answer = Answer("", is_complete=True)
    for system, values in scores.items():
        for question, value in zip(questions, values, strict=True):
            yield Outcome(question, system, seed, answer, Verdict(value))


def _mean_shares(
    found: Sequence[Mapping[str, Mapping[str, Mapping[str, float]]]],
) -> dict[str, dict[str, dict[str, float]]]:
    return {
        router: {
            rule: {name: sum(each[router][rule][name] for each in found) / len(found) for name in shares}
            for rule, shares in rules.items()
        }
        for router, rules in found[0].items()
    }
