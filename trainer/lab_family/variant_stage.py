"""How each variant is made: by the jobs that users submit, on what the family has left behind, or by merging.

Single models are routers whose experts teach nothing (`sft.expert_weight` 0): what is left of L_SFT is L_LM, and of the
checkpoint its causal LM.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

from fusionroute.lab.tokenizer import encode
from fusionroute.router_model import COMPLETE_FILE, HEAD_FILE, MANIFEST_FILE
from trainer.config import CdpoJob, LabelJob, SftJob
from trainer.lab_family import router_stage
from trainer.lab_family.policy import SingleModel
from trainer.lab_family.recipe import EXPERT_SLOTS, Recipe, Stage
from trainer.lab_family.router_stage import LABELS, MAX_ANSWER_TOKENS
from trainer.lab_family.training import StageReport, seed_torch
from trainer.lab_family.variants import ALL_GOLD_LABELS, all_gold_steps, num_steps, variants_folder
from trainer.merging import MergeMethod, MergeSettings, merge
from trainer.run import run as run_job
from trainer.run_context import RunContext

Values = dict[str, Any]

CHECKPOINT = "checkpoint"
"""Of a single model, what it was taken from: phase II may begin there."""

_SECTIONS: dict[str, Values] = {
    "cdpo_bias0": {"cdpo": {"bias_scale": 0.0}},
    "cdpo_normalised": {"cdpo": {"policy": "normalised"}},
    "cdpo_mean_bias": {"cdpo": {"bias_reduction": "mean"}},
    "cdpo_frozen_routes": {"cdpo": {"routes": "frozen"}},
    "cdpo_pairs_only": {"mixed": {"sft_rows_per_pair": 0.0}},
    "sft_all_tokens": {"sft": {"tokens": "all"}},
}
_MERGES = {
    "merge_average": MergeSettings(MergeMethod.AVERAGE),
    "merge_task_0.5": MergeSettings(MergeMethod.TASK, scales=(0.5,)),
    "merge_task_1.0": MergeSettings(MergeMethod.TASK, scales=(1.0,)),
    "merge_dare": MergeSettings(MergeMethod.DARE, scales=(0.5,), drop_rate=0.5),
    "merge_ties": MergeSettings(MergeMethod.TIES, scales=(1.0,), density=0.2),
}


def run(
    name: str,
    recipe: Recipe,
    seed: int,
    family: Path,
    output: Path,
    made_from: Path | None,
    report: StageReport,
) -> dict[str, Any]:
    """Make the variant of this name.

    Args:
        name: a key of `VARIANTS`, or `ALL_GOLD_LABELS`.
        family: folder of a complete family.
        output: empty folder; the model goes to ``output/name``.
        made_from: folder of the variant that this one is made from, if it is from one.
        report: called with (name, steps taken, loss) now and then.

    Returns:
        Facts about the run: metrics and seconds.
    """
    start, cpu_start = time.perf_counter(), time.process_time()
    seed_torch(f"{seed}/{name}")
    making = _Making(name, recipe, seed, family, output, made_from, report)
    facts = making.how()()
    seconds = {
        "seconds": round(time.perf_counter() - start, 2),
        "cpu_seconds": round(time.process_time() - cpu_start, 2),
    }
    return {**facts, **seconds}


class _Making:
    """One variant under way."""

    def __init__(
        self,
        name: str,
        recipe: Recipe,
        seed: int,
        family: Path,
        output: Path,
        made_from: Path | None,
        report: StageReport,
    ) -> None:
        self._name, self._recipe, self._seed = name, recipe, seed
        self._family, self._output, self._given, self._report = family, output, made_from, report

    def how(self) -> Callable[[], dict[str, Any]]:
        """What makes it."""
        name = self._name
        if name in _MERGES:
            return self._merge
        if name == ALL_GOLD_LABELS:
            return self._label_all_gold
        if name == "single_dpo":
            return self._single_dpo
        if name.startswith("single_"):
            return self._single
        return self._cdpo if name.startswith("cdpo_") else self._sft

    def _merge(self) -> dict[str, Any]:
        settings = _MERGES[self._name]
        settings = MergeSettings(
            settings.method, settings.scales, settings.drop_rate, settings.density, self._seed
        )
        experts = [self._family / "experts" / slot for slot in EXPERT_SLOTS]
        base = self._family / "base" if settings.method.needs_base else None
        merge(experts, self._output / self._name, settings, base)
        self._report(self._name, 1, 0.0)
        return {}

    def _label_all_gold(self) -> dict[str, Any]:
        shared = router_stage.experts_and_data(self._family, self._all_gold(), self._output / LABELS)
        config = LabelJob.from_values({name: shared[name] for name in ("experts", "data", "labels")})
        run_job(config, RunContext(self._output / ".labels"))
        shutil.rmtree(self._output / ".labels")
        self._report(self._name, 1, 0.0)
        return {}

    def _cdpo(self) -> dict[str, Any]:
        values = self._cdpo_values() | _SECTIONS.get(self._name, {})
        facts: dict[str, Any] = {}
        if self._name == "cdpo_pairs_only":  # as many pairs in a step as with gold answers beside them
            values["training"]["batch_rows"] = 2 * self._recipe.preferences.batch_size
        if self._name == "cdpo_expert_pairs":
            pairs, count = self._expert_pairs()
            values["pairs"] |= {"files": [str(pairs)]}
            values["labels"] |= {"folder": str(self._labels_beside_texts())}
            facts = {"num_pairs": count}
        facts |= self._run(CdpoJob.from_values(values), self._recipe.preferences)
        shutil.rmtree(self._output / LABELS, ignore_errors=True)
        return facts

    def _sft(self) -> dict[str, Any]:
        stage = self._recipe.router
        if self._name == "sft_continued":
            stage = self._recipe.preferences
            values = self._sft_values("router_sft", stage, self._steps_of_cdpo()) | {"routing": "kept"}
        elif self._name == "sft_all_gold":
            values = self._sft_values("experts/format", stage, all_gold_steps(self._recipe), all_gold=True)
        else:
            start = "base" if self._name == "sft_from_base" else "experts/format"
            values = self._sft_values(start, stage, stage.num_steps) | _SECTIONS.get(self._name, {})
        return self._run(SftJob.from_values(values), stage)

    def _single(self) -> dict[str, Any]:
        start = self._name.rpartition("_")[2]
        folder = "base" if start == "base" else f"experts/{start}"
        stage, all_gold = self._recipe.router, "all_gold" in self._name
        steps = all_gold_steps(self._recipe) if all_gold else stage.num_steps
        values = self._sft_values(folder, stage, steps, all_gold=all_gold) | {"sft": {"expert_weight": 0.0}}
        facts = self._run(SftJob.from_values(values), stage, as_name=CHECKPOINT)
        self._take_out(self._output / CHECKPOINT)
        return facts

    def _single_dpo(self) -> dict[str, Any]:
        values = self._cdpo_values() | {
            "router": str(self._made_from() / CHECKPOINT),
            "cdpo": {"bias_scale": 0.0},
            "sft": {"expert_weight": 0.0},
        }
        facts = self._run(CdpoJob.from_values(values), self._recipe.preferences, as_name=CHECKPOINT)
        self._take_out(self._output / CHECKPOINT)
        return facts

    def _cdpo_values(self) -> Values:
        values = router_stage.cdpo_values(self._recipe, self._seed, self._family, self._labels())
        return {**values, "gates": {"enabled": False}}

    def _sft_values(self, start: str, stage: Stage, steps: int, *, all_gold: bool = False) -> Values:
        data, labels = [self._family / "data" / "router.jsonl.gz"], self._labels()
        if all_gold:
            data, labels = self._all_gold(), self._made_from() / LABELS
        return {
            **router_stage.experts_and_data(self._family, data, labels),
            "router": str(self._family / start),
            "training": {**router_stage.training_of(stage, self._seed), "max_steps": steps},
            "gates": {"enabled": False},
        }

    def _run(self, config: SftJob | CdpoJob, stage: Stage, as_name: str | None = None) -> dict[str, Any]:
        reported = Stage(num_steps(self._name, self._recipe), stage.batch_size, stage.learning_rate)
        stages = {"training": (self._name, reported)}
        return router_stage.run_job(config, self._output, as_name or self._name, self._report, stages)

    def _labels(self) -> Path:
        """What the family keeps; beside its variants where it has kept none."""
        kept = self._family / LABELS
        return kept if kept.is_dir() else variants_folder(self._family) / LABELS

    def _labels_beside_texts(self) -> Path:
        """A folder for labels of other pairs, with those of the same texts."""
        folder, texts = self._output / LABELS, self._labels() / "texts"
        folder.mkdir()
        if texts.is_dir():
            (folder / "texts").symlink_to(texts)
        return folder

    def _made_from(self) -> Path:
        assert self._given is not None, f"{self._name} is made from another variant"
        return self._given

    def _all_gold(self) -> list[Path]:
        return [self._family / "data" / name for name in ("router.jsonl.gz", "prompts.jsonl.gz")]

    def _steps_of_cdpo(self) -> int:
        return int(self._preferences()["steps"])

    def _preferences(self) -> dict[str, Any]:
        facts = json.loads((self._family / "facts.json").read_text(encoding="utf-8"))
        found: dict[str, Any] = facts["stages"]["preferences"]
        return found

    def _expert_pairs(self) -> tuple[Path, int]:
        """As many pairs as the family has, each with the wrong answer of an expert that is drawn among those wrong."""
        items = router_stage.pair_items(self._recipe, self._seed)
        prompts, golds = [encode(item.prompt) for item in items], list(map(router_stage.gold_ids, items))
        answers = [
            SingleModel(self._family / "experts" / slot).answers(prompts, MAX_ANSWER_TOKENS)
            for slot in EXPERT_SLOTS
        ]
        random = Random(f"{self._seed}/expert_pairs")  # noqa: S311 - not for secrets
        chosen = []
        for gold, *given in zip(golds, *answers, strict=True):
            wrong = [answer for answer in given if answer != gold]
            chosen.append(random.choice(wrong) if wrong else gold)
        rows = router_stage.pairs_of(items, chosen)[: int(self._preferences()["num_pairs"])]
        path = self._output / "pairs.jsonl.gz"
        router_stage.write_rows(path, rows)
        return path, len(rows)

    def _take_out(self, checkpoint: Path) -> None:
        """The causal LM of a checkpoint, without what makes it a router."""
        ours = shutil.ignore_patterns(HEAD_FILE, MANIFEST_FILE, COMPLETE_FILE)
        shutil.copytree(checkpoint, self._output / self._name, ignore=ours)
