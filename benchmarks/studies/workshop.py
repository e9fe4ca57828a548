"""Trains what a study needs and keeps it: experts, phase I, pairs, phase II, extensions, by the product's own jobs.

    <family>.studies/expert-NAME-<digest>/expert/                 a causal LM
    <family>.studies/{sft,cdpo,extended}-<digest>/router/         a router checkpoint
                                                  data/  labels/  what it has learnt from, unless that is the family's
    <family>.studies/pairs-<digest>/                              wrong answers of a router of phase I

Each folder is whole or not there, as families are, and made by one process while others wait.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import re
import shutil
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from random import Random
from typing import Any

from benchmarks.studies import experts, plan
from benchmarks.studies.plan import Cdpo, Extended, Router, Sft
from fusionroute.lab.tasks import TASKS, Group, Item, Payloads, Split, make_item
from trainer.config import CdpoJob, ExtendJob, SftJob
from trainer.lab_family import cache, router_stage
from trainer.lab_family.build import Family
from trainer.lab_family.policy import FusedPolicy
from trainer.lab_family.recipe import EXPERT_SLOTS, Recipe
from trainer.lab_family.router_stage import LABEL_BATCH_TOKENS, LABELS, MAX_ROW_TOKENS, ROUTER_STARTS_FROM
from trainer.lab_family.training import seed_torch

Tell = Callable[[str], None]
Values = dict[str, Any]

NEEDS_MATH = re.compile(r"\d[-+*]\d")
GAP_TASKS = [task for task, group in TASKS.items() if group is Group.GAP]
TEXTS = "data/router.jsonl.gz"
WAIT_SECONDS = 3600.0


class Workshop:
    """Everything that studies train from one family.

    Args:
        family: complete.
        tell: called with what is about to be trained.

    Attributes:
        root: folder of everything that is made.
        seed, recipe: of the family.
    """

    def __init__(self, family: Family, tell: Tell) -> None:
        self._family, self._tell = family, tell
        self.seed: int = family.facts["seed"]
        self.recipe = Recipe.from_json(family.facts["recipe"])
        self.root = family.folder.with_name(f"{family.folder.name}.studies")
        self.root.mkdir(exist_ok=True)

    @property
    def family(self) -> Path:
        """The family's folder."""
        return self._family.folder

    def expert(self, name: str) -> Path:
        """Folder of an expert, made now where it is not there yet. Raises KeyError: there is no such expert."""
        own = experts.folder_of_family(name, self.family)
        if own is not None:
            return own

        def make(partial: Path) -> None:
            experts.make_expert(name, self.recipe, self.seed, self.family, partial / "expert")

        return self._kept(f"expert-{name}", make) / "expert"

    def router(self, router: Router) -> Path:
        """Folder of a router's checkpoint, trained now where it is not there yet."""
        if router == Sft():
            return self._family.router_sft
        if router == Cdpo():
            return self._family.router
        makers: dict[type, Callable[[Any, Path], None]] = {
            Sft: self._sft,
            Cdpo: self._cdpo,
            Extended: self._extend,
        }
        kind = type(router)
        name = f"{kind.__name__.lower()}-{plan.digest_of(router)}"
        return self._kept(name, lambda partial: makers[kind](router, partial)) / "router"

    def _kept(self, name: str, make: Callable[[Path], None]) -> Path:
        digest = hashlib.sha256(f"{self.family.name} {name} {_code_digest()}".encode()).hexdigest()[:12]
        folder = self.root / f"{name}-{digest}"
        with cache.only_builder(folder, WAIT_SECONDS, lambda: self._tell(f"waiting for {name}")):
            if not cache.is_complete(folder):
                self._tell(name)
                partial = cache.begin(folder)
                try:
                    make(partial)
                    cache.finish(partial, folder, {"name": name, "seed": self.seed})
                finally:
                    shutil.rmtree(partial, ignore_errors=True)
        return folder

    def _sft(self, router: Sft, partial: Path) -> None:
        seed_torch(f"{self.seed}/studies/sft")
        has_labels_of_family = _has_data_of_family(router) and router.experts == EXPERT_SLOTS
        labels = (self.family if has_labels_of_family else partial) / LABELS
        texts = (self.family if _has_data_of_family(router) else partial) / TEXTS
        if not _has_data_of_family(router):
            router_stage.write_rows(texts, _written(self._items(router)))
        stage = self.recipe.router
        values = {
            **self._common(router, [texts], labels),
            "router": str(self.expert(ROUTER_STARTS_FROM)),
            "training": {**router_stage.training_of(stage, self.seed), "max_steps": stage.num_steps},
            "gates": self._gates(),
        }
        self._run(SftJob.from_values({**values, **router.switches}), partial)

    def _cdpo(self, router: Cdpo, partial: Path) -> None:
        seed_torch(f"{self.seed}/studies/cdpo")
        pairs, labels = self._pairs(router.of)
        stage = self.recipe.preferences
        values = {
            **self._common(router, [self._texts_of(router.of)], labels),
            "router": str(self.router(router.of)),
            "pairs": {"files": [str(pairs)], "max_tokens": MAX_ROW_TOKENS},
            "training": {
                **router_stage.training_of(stage, self.seed),
                "batch_rows": 3 * stage.batch_size,
                "epochs": self.recipe.preference_epochs,
            },
            "gates": self._gates(),
        }
        self._run(CdpoJob.from_values({**values, **router.switches}), partial)

    def _extend(self, router: Extended, partial: Path) -> None:
        base = router.of if isinstance(router.of, Sft) else router.of.of
        lines = gzip.decompress(self._texts_of(base).read_bytes()).decode().splitlines()
        rows = [json.loads(line) for line in lines]
        parts = {
            needs: [row for row in rows if bool(NEEDS_MATH.search(row["prompt"])) is needs]
            for needs in (True, False)
        }
        new, old = partial / "data" / "new.jsonl.gz", partial / "data" / "old.jsonl.gz"
        router_stage.write_rows(new, parts[True])
        router_stage.write_rows(old, parts[False])
        values = {
            **self._common(router, [new], partial / LABELS),
            "router": str(self.router(router.of)),
            "seed": self.seed,
            "device": "cpu",
        }
        del values["report"]
        if router.replays:
            values["old_data"] = {"files": [str(old)], "max_tokens": MAX_ROW_TOKENS}
        self._run(ExtendJob.from_values(values), partial)

    def _pairs(self, router: Sft) -> tuple[Path, Path]:
        """The file of the pairs of a router's own mistakes, and a folder for labels of them and of its texts."""
        if router == Sft():
            return self.family / "data" / "pairs.jsonl.gz", self.family / LABELS

        def make(partial: Path) -> None:
            policy = FusedPolicy(self.router(router), [self.expert(name) for name in router.experts])
            items = router_stage.pair_items(self.recipe, self.seed)
            found = router_stage.wrong_answers(policy, items, self.seed)
            router_stage.write_rows(partial / "pairs.jsonl.gz", found)

        folder = self._kept(f"pairs-{plan.digest_of(router)}", make)
        return folder / "pairs.jsonl.gz", folder / LABELS

    def _texts_of(self, router: Sft) -> Path:
        return (self.family if _has_data_of_family(router) else self.router(router).parent) / TEXTS

    def _common(self, router: Router, texts: Sequence[Path], labels: Path) -> Values:
        names = plan.experts_of(router)
        return {
            "experts": {_slot(name): {"model": str(self.expert(name)), "name": name} for name in names},
            "data": {"files": [str(path) for path in texts], "max_tokens": MAX_ROW_TOKENS},
            "labels": {"folder": str(labels), "batch_tokens": LABEL_BATCH_TOKENS},
            "report": {"enabled": False},
        }

    def _gates(self) -> Values:
        stage = self.recipe.gates
        return {
            "num_steps": stage.num_steps,
            "batch_targets": stage.batch_size,
            "learning_rate": stage.learning_rate,
            "warmup_steps": stage.warmup_steps,
            "sum_gate": False,
        }

    def _items(self, router: Sft) -> list[Item]:
        """Gold answers of training payloads, of as many tasks alike as there are, or of gaps by their share."""
        count = router.num_items or self.recipe.num_router_items
        random = Random(f"{self.seed}/router")  # noqa: S311 - not for secrets
        payloads, tasks = Payloads(random, Split.TRAIN), tuple(TASKS)
        if router.gap_share is None:
            return [make_item(random.choice(tasks), payloads) for _ in range(count)]
        rest = [task for task in tasks if task not in GAP_TASKS]
        chosen = [GAP_TASKS if random.random() < router.gap_share else rest for _ in range(count)]
        return [make_item(random.choice(some), payloads) for some in chosen]

    def _run(self, config: SftJob | CdpoJob | ExtendJob, partial: Path) -> None:
        router_stage.run_job(config, partial, "router", lambda name, step, loss: None, {})


def _has_data_of_family(router: Sft) -> bool:
    return router.num_items is None and router.gap_share is None


def _slot(name: str) -> str:
    return re.sub(r"[^a-z0-9_-]", "-", name)


def _written(items: Iterable[Item]) -> list[dict[str, Any]]:
    return [{"prompt": item.prompt, "completion": item.answer} for item in items]


def _code_digest() -> str:
    """Of what decides models beyond what decides families (which is in the family's name)."""
    here = Path(__file__).parent
    return cache.digest_of_sources([here / "experts.py", here / "workshop.py"])
