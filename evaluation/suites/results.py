"""The report of a suite: cells and comparisons of answers and of texts, and who took part."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from evaluation.findings import ALL, Cell, Comparison, Findings, RoutingShare
from evaluation.questions import Outcome
from evaluation.statistics.cells import accuracy_cells, cells, weighted_cells
from evaluation.statistics.comparing import accuracy_compare, compare, weighted_compare
from evaluation.statistics.panels import divisions_of, strata_names
from evaluation.statistics.verdicts import verdict_sentence
from evaluation.suites.asking import Heard
from evaluation.suites.config import Suite

LIMITS = (
    "Scores are of these questions and these models; intervals and tests take clusters of questions for draws from all "
    "that might be asked.",
    "A greedy answer of models in 16 bits may change with what it is computed together with.",
)


def findings_of(suite: Suite, heard: Heard, facts: Mapping[str, Any]) -> Findings:
    """All that the report shows; `facts` are what decides the outcome besides suite and models."""
    names = [note.name for note in heard.notes]
    found: list[Cell] = []
    comparisons: list[Comparison] = []
    for outcomes, count, pair_up in (
        (heard.outcomes, cells, compare),
        (heard.views, weighted_cells, weighted_compare),
        (heard.views, accuracy_cells, accuracy_compare),
    ):
        asked = [name for name in names if any(each.system == name for each in outcomes)]
        if not asked:
            continue
        strata = strata_names(divisions_of(outcomes))
        found += count(outcomes, asked, strata)
        pairs = [(suite.baseline, name) for name in asked if name != suite.baseline]
        if suite.baseline in asked and pairs:
            comparisons += pair_up(outcomes, pairs, strata)
    labels = {note.name: note.label for note in heard.notes}
    return Findings(
        name=suite.name,
        summary=tuple(verdict_sentence(each, labels) for each in comparisons if each.stratum == ALL),
        limits=LIMITS,
        systems=tuple(heard.notes),
        divisions=divisions_of([*heard.outcomes, *heard.views]),
        cells=tuple(found),
        comparisons=tuple(comparisons),
        routing=tuple(_routing(heard.outcomes, heard.slots)),
        slots=heard.slots,
        facts={"suite": suite.model_dump(mode="json"), "models": heard.models, **facts},
        baseline=suite.baseline if suite.baseline in names else "",
    )


def write_answers(outcomes: Sequence[Outcome], folder: Path) -> None:
    """A file of answers for each system, ``{"id", "prompt", "answer"}`` a line, as `fusionroute eval judge` reads them.

    With several seeds the seed is part of the id.
    """
    folder.mkdir(parents=True, exist_ok=True)
    several = len({outcome.seed for outcome in outcomes}) > 1
    lines: dict[str, list[str]] = {}
    for outcome in outcomes:
        question = outcome.question
        entry = {
            "id": f"{question.id}#{outcome.seed}" if several else question.id,
            "prompt": question.prompt if isinstance(question.prompt, str) else list(question.prompt),
            "answer": outcome.answer.text,
        }
        lines.setdefault(outcome.system, []).append(json.dumps(entry, ensure_ascii=False) + "\n")
    for system, written in lines.items():
        draft = folder / ".draft"
        draft.write_text("".join(written), encoding="utf-8")
        draft.rename(folder / f"{system.replace('/', '+')}.jsonl")


def _routing(outcomes: Sequence[Outcome], slots: Sequence[str]) -> Iterator[RoutingShare]:
    counts: dict[tuple[str, str], Counter[str]] = {}
    for outcome in outcomes:
        for stratum in (ALL, f"task={outcome.question.task}"):
            counts.setdefault((outcome.system, stratum), Counter()).update(outcome.answer.experts)
    for (system, stratum), of_slots in counts.items():
        total = sum(of_slots.values())
        if total and len(of_slots) > 1:
            shares = {slot: of_slots[slot] / total for slot in (*slots, "")}
            yield RoutingShare(system, stratum, total, shares)
