"""What was found: negative log-probability and share of right tokens of every system, by domain, and comparisons."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from benchmarks.real_text.asking import ALONE, ORACLE, ORACLE_TEXT, RULES, WAYS
from benchmarks.real_text.sizes import ASKED, EXPERTS, GAP, MIXED, UNSEEN
from evaluation.findings import ALL, Comparison, Findings, RoutingShare, SystemNote
from evaluation.questions import Outcome
from evaluation.statistics.cells import accuracy_cells, weighted_cells
from evaluation.statistics.comparing import accuracy_compare, weighted_compare
from evaluation.statistics.verdicts import verdict_sentence
from evaluation.systems.ways import GATED

PAPER = "sft/sum"
LABELS = {"sft": "after SFT", "mixture_sft": "after SFT with mixture routes", "cdpo": "after CDPO"}
SYSTEMS = (
    SystemNote("base", "base, not fine-tuned", "model"),
    *(way.system() for way in ALONE),
    SystemNote("ensemble", "uniform ensemble", "served"),
    SystemNote("merged", "mean of the experts' weights", "model"),
    SystemNote("single", "one model fine-tuned on the router's data", "model"),
    *(
        SystemNote(f"{checkpoint}/{way.name}", f"{way.label}, {label}", "served")
        for checkpoint, label in LABELS.items()
        for way in WAYS[checkpoint]
        if way in RULES
    ),
    SystemNote(ORACLE_TEXT, "oracle: best expert for each text", "selection"),
    SystemNote(ORACLE, "oracle: best expert at each token", "forced", "looks at the right token; nobody can serve it"),
)  # fmt: skip
PAIRS = (
    *((f"sft/{way.name}", PAPER) for way in (*GATED, *RULES[4:])),
    ("cdpo/sum", PAPER),
    ("mixture_sft/sum", PAPER),
    *((other, PAPER) for other in ("single", "ensemble", "merged", ORACLE_TEXT)),
    ("sft/mixture", "single"),
    ("sft/mixture", "sft/select"),
    ("sft/mixture", "sft/router"),
    ("sft/mixture", "sft/route"),
    ("sft/mixture", ORACLE_TEXT),
    ("cdpo/mixture", "sft/mixture"),
    ("mixture_sft/route", "sft/route"),
    ("mixture_sft/mixture", "sft/mixture"),
    ("mixture_sft/mixture", "mixture_sft/sum"),
)
"""First minus second."""
STRATA = (ALL, *(f"task={domain}" for domain in ASKED))
MEANING = {
    **dict.fromkeys(EXPERTS, "held-out texts of this expert's domain"),
    MIXED: "texts that change from one expert's domain to another's midway",
    GAP: "in the router's data, in no expert's",
    UNSEEN: "in nobody's data",
}
LIMITS = (
    "Models of 260 thousand parameters with 512 tokens of about one and a half characters: they spell more than they "
    "reason, and nothing here says how large models do.",
    "Texts are judged token by token after the right beginning; nobody wrote an answer of its own.",
)


def findings_of(outcomes: Sequence[Outcome], facts: Mapping[str, Any]) -> Findings:
    """Of all seeds' outcomes."""
    asked = {each.system for each in outcomes}
    systems = tuple(note for note in SYSTEMS if note.name in asked)
    names = [note.name for note in systems]
    pairs = [pair for pair in PAIRS if asked.issuperset(pair)]
    losses = weighted_compare(outcomes, pairs, STRATA)
    accuracies = accuracy_compare(outcomes, pairs, STRATA)
    labels = {note.name: note.label for note in systems}
    return Findings(
        name="real_text",
        summary=tuple(verdict_sentence(each, labels) for each in losses if each.stratum == ALL),
        limits=LIMITS,
        systems=systems,
        divisions={"task": ASKED},
        cells=(*weighted_cells(outcomes, names, STRATA), *accuracy_cells(outcomes, names, STRATA)),
        comparisons=(*losses, *accuracies),
        routing=tuple(_routing(outcomes)),
        slots=EXPERTS,
        facts=facts,
        baseline=PAPER,
    )


def of_pair(found: Sequence[Comparison], first: str, second: str, stratum: str, measure: str) -> Comparison:
    """Raises StopIteration: it was not compared."""
    wanted = (first, second, stratum, measure)
    return next(each for each in found if (each.first, each.second, each.stratum, each.measure) == wanted)


def _routing(outcomes: Sequence[Outcome]) -> Iterator[RoutingShare]:
    shown = [ORACLE, *(f"{one}/{way}" for one in LABELS for way in ("route", "select"))]
    counts: dict[tuple[str, str], Counter[str]] = {}
    for outcome in outcomes:
        if outcome.system in shown:
            for stratum in (ALL, f"task={outcome.question.task}"):
                counts.setdefault((outcome.system, stratum), Counter()).update(outcome.answer.experts)
    for system, stratum in ((system, stratum) for system in shown for stratum in STRATA):
        of_slots = counts.get((system, stratum), Counter())
        total = sum(of_slots.values())
        if not total:
            continue
        yield RoutingShare(system, stratum, total, {slot: of_slots[slot] / total for slot in (*EXPERTS, "")})
