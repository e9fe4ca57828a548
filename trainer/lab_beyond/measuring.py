"""Both experiments for one seed: which items every gate and rule gets right beyond the lab's favourable conditions."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from fusionroute.lab.tasks import Split as LabSplit
from fusionroute.lab.tasks import evaluation_items, fact_of
from fusionroute.lab.views import Split, Task, view_items
from fusionroute.router_model import Heads, load_checkpoint
from trainer.config import ExpertSource, LabelsTable
from trainer.frozen_models import FrozenModel
from trainer.gates import train_gates
from trainer.gates_table import GatesTable
from trainer.lab_beyond import gap_families, views_family
from trainer.lab_beyond.first_choices import Opinions, gold_of, judged, model_rows
from trainer.lab_beyond.gap_families import FAMILIES, Lesson
from trainer.lab_family import stages
from trainer.lab_family.recipe import EXPERT_SLOTS, Recipe
from trainer.labelling import label_rows
from trainer.phases import expert_loader
from trainer.rows import Row, RowSet
from trainer.run_context import RunContext

COVERED = "covered"
NOTHING = "nothing"
GATES = {
    "linear": GatesTable(),
    "mlp": GatesTable(shape="mlp"),
    "reaching": GatesTable(reaches_router=True),
}
"""The kinds of gates that are compared."""

Tell = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Asked:
    """An item as statistics need it: a name of its own, what it shares with others, and where it stands in a table."""

    id: str
    cluster: str
    part: str


@dataclass(frozen=True, slots=True)
class Measured:
    """Items, and by system which of them it gets right."""

    items: tuple[Asked, ...]
    right: dict[str, list[bool]]


def build_lab(folder: Path, recipe: Recipe, seed: int) -> Path:
    """Base, experts and router of phase I, each unless it is there."""
    for stage, made in (
        ("base", "base"),
        *((slot, f"experts/{slot}") for slot in EXPERT_SLOTS),
        ("router", "router_sft"),
    ):
        if not (folder / made / "tokenizer.json").exists():
            stages.run(stage, recipe, seed, folder, lambda name, step, loss: None)
    return folder


def left_out_families(folder: Path, recipe: Recipe, seed: int, per_task: int, tell: Tell) -> Measured:
    """Every kind of gate, fitted to all rows and with each kind of gap left out; systems GATE/LEFT OUT/RULE.

    Args:
        folder: of a lab family, see `build_lab`.
        recipe: its own.
        seed: its own.
        per_task: test items of each task.
        tell: called with what is about to be done.
    """
    items = evaluation_items(LabSplit.TEST, per_task)
    rows = RowSet.of(Row.of(row.ids, row.supervised) for row in map(views_family.gold_row, items))
    lesson = Lesson.of(folder)
    experts = torch.stack([model_rows(folder / "experts" / slot, rows)[0] for slot in EXPERT_SLOTS])
    logits, states = model_rows(folder / "router_sft", rows)
    frozen, heads = Opinions(rows, states, logits, experts, gold_of(rows)), dict[str, Heads]()
    right: dict[str, list[bool]] = {}
    for left_out in ("", *FAMILIES):
        name = left_out or NOTHING
        for gate in ("linear", "mlp"):
            tell(f"{gate} gates without {name}")
            table = gap_families.table_of(recipe, shape=gate)
            heads[f"{gate}/{name}"] = gap_families.fitted(lesson, left_out, table, seed)
        tell(f"reaching gate without {name}")
        target = folder / "reaching" / name
        table = gap_families.table_of(recipe, reaches_router=True)
        learnt = gap_families.learnt_together(lesson, left_out, table, recipe, seed, target)
        logits, states = model_rows(target, rows)
        given = dataclasses.replace(frozen, states=states, router=logits)
        right |= judged(given, {f"reaching/{name}": learnt}, ())
    right |= judged(frozen, heads, EXPERT_SLOTS)
    part = {task: family for family, tasks in FAMILIES.items() for task in tasks}
    asked = [
        Asked(f"lab/{number}", fact_of(item.prompt) or item.prompt, part.get(item.task, COVERED))
        for number, item in enumerate(items)
    ]
    return Measured(tuple(asked), right)


def two_views(folder: Path, recipe: Recipe, seed: int, per_task: int, tell: Tell) -> Measured:
    """Every kind of gate on the tasks with two views: systems GATE/RULE.

    Gates are fitted on keys that the router has not met (but for the one that learns with it), as keys of the test are
    not met either.
    """
    tell("views: experts")
    folders = views_family.build_experts(folder, seed, recipe)
    items = view_items(Split.TEST, per_task, tasks=tuple(Task))
    rows = _gold_rows(items)
    experts = torch.stack([model_rows(path, rows)[0] for path in folders.values()])
    right: dict[str, list[bool]] = {}
    for gate, table in GATES.items():
        tell(f"views: router with {gate} gates")
        name = "reaching" if table.reaches_router else "router"
        learns = table if table.reaches_router else GatesTable(enabled=False)
        router = views_family.train_router(folder, name, seed, learns, recipe)
        logits, states = model_rows(router, rows)
        heads = load_checkpoint(router).heads
        if not table.reaches_router:
            heads = _fitted_on_fresh_keys(folder, router, heads, table, seed, recipe)
        given = Opinions(rows, states, logits, experts, gold_of(rows))
        right = (
            judged(given, {gate: heads}, views_family.SLOTS) | right
        )  # bounds are those of the first router
    asked = [Asked(f"views/{number}", item.cluster, item.part.value) for number, item in enumerate(items)]
    return Measured(tuple(asked), right)


def _fitted_on_fresh_keys(
    folder: Path, router: Path, heads: Heads, table: GatesTable, seed: int, recipe: Recipe
) -> Heads:
    items = views_family.gold_items(f"views/{seed}/gates", recipe.num_router_items, Split.GATE)
    rows, context = _gold_rows(items), RunContext(folder)
    sources = {slot: ExpertSource(model=str(folder / slot)) for slot in views_family.SLOTS}
    labels, _ = label_rows(rows, sources, LabelsTable(folder=folder / "labels-of-gates"), context)
    schedule = GatesTable.model_validate(views_family.fitted_as(recipe.gates, table))
    frozen = FrozenModel.load(str(router), "router")
    return train_gates(frozen, heads, rows, labels, schedule, seed, context, expert_loader(sources, "cpu"))[0]


def _gold_rows(items: Sequence[views_family.AnyItem]) -> RowSet:
    return RowSet.of(Row.of(row.ids, row.supervised) for row in map(views_family.gold_row, items))
