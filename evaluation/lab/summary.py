"""What the lab's numbers say in words, negative findings among them, and what they do not say."""

from __future__ import annotations

from collections.abc import Sequence

from evaluation.findings import ALL, Cell, Comparison, SystemNote
from evaluation.lab.plan import SFT
from evaluation.lab.systems import FUSIONROUTE
from evaluation.statistics.verdicts import verdict_sentence
from evaluation.systems.ways import ROUTING_ONLY, SUM

LIMITS = (
    "The lab shows a mechanism under conditions made for it: experts that each know one thing, gap tasks that none of "
    "them knows. It is no evidence that large models satisfy these conditions.",
    "By construction one expert alone cannot answer composites, routing alone cannot answer gap tasks, and a model "
    "that never saw the math expert's data cannot know its held-out facts: what a single fine-tuned model lacks is "
    "knowledge, not method. Where payloads were seen it has that knowledge, and the table says what it does with it.",
    "The lab favours rules that select: tokens where only the sum of two models is right hardly occur, and the gate's "
    "data hold every kind of gap.",
    "Exact match is decided along the gold answer by the running services: a greedy answer equals it exactly when "
    "every first choice on the way is right. Part of the answers are written as well, and must agree.",
    "Held-out number facts (77), days and months (19) are few: their questions repeat, and count as clusters.",
    "With three or four seeds the bootstrap is too sure of the seeds; Student's interval over them stands beside it.",
)

WHERE = {
    ALL: "over all tasks",
    "coverage=covered": "on covered tasks",
    "coverage=gap": "on gap tasks",
    "seen=covered": "on covered tasks whose payloads its data hold",
    "seen=gap": "on gap tasks whose payloads its data hold",
}

_ROUTE_SFT = f"{SFT}/{ROUTING_ONLY.name}"
_SUM_SFT = f"{SFT}/{SUM.name}"


def summary_of(
    cells: Sequence[Cell], comparisons: Sequence[Comparison], systems: Sequence[SystemNote]
) -> tuple[str, ...]:
    """Sentences: the main system, what each part of it is worth, who is better than it, and where."""
    labels = {note.name: note.label for note in systems}
    shares = {(cell.system, cell.stratum): cell for cell in cells}
    told: list[str] = []
    if (FUSIONROUTE, ALL) in shares:
        parts = [shares[FUSIONROUTE, stratum] for stratum in (ALL, "coverage=covered", "coverage=gap")]
        told.append(
            f"FusionRoute (sum, after SFT and CDPO) answers {_share(parts[0])} of the held-out questions: "
            f"{_share(parts[1])} of those that experts cover, {_share(parts[2])} of the gaps."
        )
    for first, second in ((FUSIONROUTE, _ROUTE_SFT), (FUSIONROUTE, _SUM_SFT)):
        told += [
            verdict_sentence(each, labels)
            for each in comparisons
            if (each.first, each.second) == (first, second) and each.stratum != ALL
        ]
    told += _better_than_ours(comparisons, labels)
    told += _as_good_as_ours(comparisons, labels)
    return tuple(told)


def _better_than_ours(comparisons: Sequence[Comparison], labels: dict[str, str]) -> list[str]:
    """Where another system beats FusionRoute for certain; said plainly."""
    told = []
    for stratum, where in WHERE.items():
        better = [
            each
            for each in _with_ours(comparisons, stratum)
            if each.is_significant and each.difference.value < 0
        ]
        better.sort(key=lambda each: each.difference.value)
        if better:
            listed = "; ".join(f"{labels[each.second]} by {-each.difference.value:.3f}" for each in better)
            told.append(f"Better than FusionRoute {where}: {listed}.")
    return told


def _as_good_as_ours(comparisons: Sequence[Comparison], labels: dict[str, str]) -> list[str]:
    """Who is not shown to be worse over all tasks."""
    equal = [each for each in _with_ours(comparisons, ALL) if not each.is_significant]
    if not equal:
        return []
    listed = "; ".join(
        f"{labels[each.second]} ({-each.difference.value:+.3f}, would show {each.detectable:.3f})"
        for each in equal
    )
    return [
        f"Neither better nor worse than FusionRoute over all tasks, as far as these questions show: {listed}."
    ]


def _with_ours(comparisons: Sequence[Comparison], stratum: str) -> list[Comparison]:
    return [each for each in comparisons if each.first == FUSIONROUTE and each.stratum == stratum]


def _share(cell: Cell) -> str:
    estimate = cell.estimate
    return f"{estimate.value:.3f} [{estimate.low:.3f}, {estimate.high:.3f}]"
