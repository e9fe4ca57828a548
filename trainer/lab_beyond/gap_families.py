"""Gates that have never seen one kind of gap: fitted to, or learnt with, a lab router whose own data had all kinds."""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fusionroute.lab.tasks import TASKS, Group
from fusionroute.lab.tokenizer import EOS_ID, encode
from fusionroute.router_model import Heads, load_checkpoint
from trainer.batches import BatchMaker
from trainer.config import ExpertSource, LabelsTable, TrainingTable
from trainer.frozen_models import FrozenModel
from trainer.gate_head import with_gate
from trainer.gates import train_gates
from trainer.gates_table import GatesTable
from trainer.lab_beyond.views_family import fitted_as
from trainer.lab_family.recipe import EXPERT_SLOTS, Recipe
from trainer.lab_family.training import seed_torch, train
from trainer.labelling import label_rows
from trainer.loop_inputs import SftLesson
from trainer.losses import LAMBDA
from trainer.phases import expert_loader
from trainer.router_module import RouterModule
from trainer.router_trainer import parameter_groups
from trainer.rows import Labels, Row, RowSet
from trainer.run_context import RunContext
from trainer.step_plan import Items

FAMILIES: Mapping[str, tuple[str, ...]] = {
    "units": ("unit", "box_unit"),
    "polite": ("pls_m", "pls_s"),
    "facts": ("fact", "ans_fact"),
}
"""The lab's kinds of gap, each with its tasks."""

COVERED_TASKS = tuple(task for task, group in TASKS.items() if group is not Group.GAP)
_PROMPTS = {
    "units": re.compile(r"\d kg=$"),
    "polite": re.compile(r"^pls "),
    "facts": re.compile(r"(^|: )(day|month) \d+=$"),
}
ROUTER_STARTS_FROM = "format"


@dataclass(frozen=True, slots=True)
class Lesson:
    """What the router of a lab family has learnt from.

    Attributes:
        folder: of the family.
        rows, labels: its gold answers and what the experts say of them.
        families: of each row its kind of gap, "" where it has none.
    """

    folder: Path
    rows: RowSet
    labels: Labels
    families: tuple[str, ...]

    @classmethod
    def of(cls, folder: Path) -> Lesson:
        """The lesson of the family in a folder; labels are computed where they are not there any more."""
        lines = gzip.decompress((folder / "data" / "router.jsonl.gz").read_bytes()).decode().splitlines()
        items = [json.loads(line) for line in lines]
        rows = RowSet.of(_row(item) for item in items)
        table = LabelsTable(folder=folder / "labels-of-gates")
        labels, _ = label_rows(rows, experts_of(folder), table, RunContext(folder))
        return cls(folder, rows, labels, tuple(family_of(item["prompt"]) for item in items))

    def without(self, family: str) -> NDArray[np.int64]:
        """Rows that are not of a kind of gap; all rows for ""."""
        kept = [family == "" or each != family for each in self.families]
        return np.flatnonzero(np.array(kept))


def experts_of(folder: Path) -> dict[str, ExpertSource]:
    """The experts of a lab family."""
    return {slot: ExpertSource(model=str(folder / "experts" / slot)) for slot in EXPERT_SLOTS}


def family_of(prompt: str) -> str:
    """The kind of gap that a prompt asks for; "" for one that the experts cover."""
    return next((family for family, pattern in _PROMPTS.items() if pattern.search(prompt)), "")


def fitted(lesson: Lesson, left_out: str, table: GatesTable, seed: int) -> Heads:
    """Both gates, fitted to `router_sft` on the rows that are not left out."""
    router = FrozenModel.load(str(lesson.folder / "router_sft"), "router")
    heads = load_checkpoint(lesson.folder / "router_sft").heads
    rows, labels = _subset(lesson, lesson.without(left_out))
    load = expert_loader(experts_of(lesson.folder), "cpu")
    return train_gates(router, heads, rows, labels, table, seed, RunContext(lesson.folder), load)[0]


def learnt_together(
    lesson: Lesson, left_out: str, table: GatesTable, recipe: Recipe, seed: int, target: Path
) -> Heads:
    """A router of phase I whose gate learns with it, from all rows but those left out, which teach the router alone.

    Steps, rates and batches are the recipe's; at each step the losses are divided as in phase I.

    Args:
        target: folder that gets the router, as a causal LM with its tokenizer.

    Returns:
        Its heads, without a sum gate.
    """
    seed_torch(f"{seed}/together/{left_out}")
    training = TrainingTable(device="cpu", learning_rate=recipe.router.learning_rate, seed=seed)
    start = str(lesson.folder / "experts" / ROUTER_STARTS_FROM)
    module = RouterModule.load(start, len(EXPERT_SLOTS), training, gates=table).train()
    assert module.gate is not None, "the table says that the gate learns with the router"
    maker = BatchMaker(SftLesson(lesson.rows, lesson.labels), None, len(EXPERT_SLOTS), all_targets=False)
    is_taught = np.zeros(len(lesson.rows), np.bool_)
    is_taught[lesson.without(left_out)] = True
    order = _orders(len(lesson.rows), recipe.router.num_steps * recipe.router.batch_size, seed)

    def loss_at(step: int) -> Tensor:
        first = step * recipe.router.batch_size
        batch = order[first : first + recipe.router.batch_size]
        return _loss(module, maker, batch[is_taught[batch]], batch[~is_taught[batch]])

    groups = parameter_groups(module, training, table)
    train(groups, recipe.router, loss_at, lambda step, loss: None)
    module.lm.eval().save_pretrained(target)
    module.tokenizer.save_pretrained(target)
    routing = dict(module.routing.named_parameters())
    heads = Heads(routing["weight"].detach(), routing["bias"].detach())
    return with_gate(heads, "gate", dict(module.gate.named_parameters()))


def table_of(recipe: Recipe, **changes: Any) -> GatesTable:
    """The table `[gates]` with the recipe's steps."""
    return GatesTable(**fitted_as(recipe.gates, GatesTable(**changes)))


def _loss(
    module: RouterModule, maker: BatchMaker, taught: NDArray[np.int64], rest: NDArray[np.int64]
) -> Tensor:
    """L_LM + lambda L_expert over all rows, and L_gate over those that teach the gate."""
    nothing = np.empty(0, np.int64)
    items = [Items(rows, nothing) for rows in (taught, rest) if len(rows)]
    counts = [maker.counts(each) for each in items]
    parts = [module(maker.batch(each, count, 1)).parts for each, count in zip(items, counts, strict=True)]
    total = torch.stack(parts).sum(dim=0)
    loss: Tensor = total[0] / max(1, sum(count.targets for count in counts))
    loss = loss + LAMBDA * total[1] / max(1, sum(count.informative for count in counts))
    return loss + parts[0][3] / max(1, counts[0].targets) if len(taught) else loss


def _orders(num_rows: int, wanted: int, seed: int) -> NDArray[np.int64]:
    random = np.random.default_rng(seed)
    return np.concatenate([random.permutation(num_rows) for _ in range(-(-wanted // num_rows))])[:wanted]


def _subset(lesson: Lesson, chosen: NDArray[np.int64]) -> tuple[RowSet, Labels]:
    starts = lesson.rows.target_starts
    flat = np.concatenate([np.arange(starts[row], starts[row + 1]) for row in chosen])
    labels = Labels(lesson.labels.gold_logprobs[flat], lesson.labels.argmax_ids[flat])
    return RowSet.of(lesson.rows[int(row)] for row in chosen), labels


def _row(item: Mapping[str, str]) -> Row:
    prompt, answer = encode(item["prompt"]), [*encode(item["completion"]), EOS_ID]
    return Row.of([*prompt, *answer], [False] * len(prompt) + [True] * len(answer))
