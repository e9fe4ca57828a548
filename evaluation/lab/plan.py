"""What an evaluation of the lab asks: sizes, seeds, questions, and who is compared."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

from evaluation.questions import Question
from evaluation.tasks.lab import lab_questions
from fusionroute.lab.tasks import Split

SFT, CDPO = "sft", "cdpo"
"""The routers of phase I and of phase II, as systems name them."""

MAIN_VARIANTS = (
    "sft_continued",
    "cdpo_bias0",
    "cdpo_normalised",
    "single_from_base",
    "single_from_math",
    "single_from_strings",
    "single_from_format",
    "merge_average",
    "merge_task_0.5",
    "merge_task_1.0",
    "merge_dare",
    "merge_ties",
)
MORE_VARIANTS = (
    "cdpo_mean_bias",
    "cdpo_frozen_routes",
    "cdpo_pairs_only",
    "cdpo_expert_pairs",
    "sft_all_gold",
    "sft_all_tokens",
    "sft_from_base",
    "single_all_gold_from_base",
    "single_all_gold_from_math",
    "single_all_gold_from_strings",
    "single_all_gold_from_format",
    "single_dpo",
)


@dataclass(frozen=True, slots=True)
class LabPlan:
    """What decides the outcome.

    Attributes:
        size: of the models, a name of the lab's recipes.
        seeds: of training; 0 is the one on which settings were chosen.
        per_task: held-out questions of each task.
        per_task_seen: questions of each task whose payloads the router's data may hold.
        per_task_written: questions of each task whose answers are also written, token by token.
        variants: further routers and models, as the trainer names them.
    """

    name: str
    size: str
    seeds: tuple[int, ...]
    per_task: int
    per_task_seen: int
    per_task_written: int
    variants: tuple[str, ...] = MAIN_VARIANTS

    def questions(self) -> list[Question]:
        """Held-out ones, then those with seen payloads, which are apart in every table."""
        held_out = lab_questions(self.per_task, (Split.TEST,))
        seen = lab_questions(self.per_task_seen, (Split.TRAIN,)) if self.per_task_seen else []
        return held_out + [
            replace(each, strata={"seen": each.strata["coverage"], "payload": each.strata["payload"]})
            for each in seen
        ]

    def written(self, questions: list[Question]) -> list[Question]:
        """Those of the questions whose answers are also written: of each task the first held-out ones."""
        found: dict[str, list[Question]] = {}
        for question in questions:
            of_task = found.setdefault(question.task, [])
            if "coverage" in question.strata and len(of_task) < self.per_task_written:
                of_task.append(question)
        return [question for of_task in found.values() for question in of_task]

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {**asdict(self), "seeds": list(self.seeds), "variants": list(self.variants)}


PLANS = {
    plan.name: plan
    for plan in (
        LabPlan("lab", "full", (1, 2, 3), 300, 60, 8),
        LabPlan("lab-ablations", "full", (1, 2, 3), 100, 30, 0, MORE_VARIANTS),
        LabPlan("lab-quick", "demo", (0,), 20, 10, 4, ("cdpo_bias0", "single_from_format", "merge_average")),
    )
}
