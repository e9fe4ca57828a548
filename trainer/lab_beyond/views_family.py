"""A family of tiny models for the tasks with two views: an expert for rows, one for formats, a router of phase I."""

from __future__ import annotations

import gzip
import json
import shutil
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch

from fusionroute.lab.tasks import DOMAIN_TASKS, Item, Owner, Payloads, make_item
from fusionroute.lab.tasks import Split as LabSplit
from fusionroute.lab.tokenizer import EOS_ID, build_tokenizer, encode
from fusionroute.lab.views import Split, Task, ViewItem, Views
from trainer.config import SftJob
from trainer.gates_table import GatesTable
from trainer.lab_family import data
from trainer.lab_family.packing import pack
from trainer.lab_family.recipe import RECIPES, Recipe, Stage
from trainer.lab_family.training import hidden_states, new_model, seed_torch, train
from trainer.losses import lm_loss
from trainer.run import run
from trainer.run_context import RunContext

SLOTS = ("rows", "format")
ROUTER_STARTS_FROM = "format"
ROUTER_TASKS = (*Task, "format")
FORMAT_STEPS = 150
RECIPE = replace(
    RECIPES["demo"],
    expert=Stage(400, 64, 3e-3),
    num_router_items=2500,
    router=Stage(120, 32, 1e-3),
    gates=Stage(400, 288, 1e-2),
)
"""Sizes of demo size; its stages `base` and `preferences` are not used."""

AnyItem = Item | ViewItem


def build_experts(folder: Path, seed: int, recipe: Recipe = RECIPE) -> dict[str, Path]:
    """Trains the two experts, each from weights of its own chance, unless they are there.

    The expert for rows has learnt every key, and that a word says nothing of the column.
    """
    makers: dict[str, tuple[Callable[[Random], data.Row], Stage]] = {
        "rows": (_rows_row, recipe.expert),
        "format": (_format_row, replace(recipe.expert, num_steps=min(FORMAT_STEPS, recipe.expert.num_steps))),
    }
    for slot, (make, stage) in makers.items():
        if not (folder / slot / "tokenizer.json").exists():
            _train_expert(folder / slot, f"views/{seed}/{slot}", make, stage, recipe)
    return {slot: folder / slot for slot in SLOTS}


def train_router(folder: Path, name: str, seed: int, gates: GatesTable, recipe: Recipe = RECIPE) -> Path:
    """Phase I over all tasks and the keys that are not held out, by the job that users submit.

    Args:
        folder: of the experts.
        name: folder within it that the checkpoint gets; what is there already is kept.
    """
    target = folder / name
    if target.exists():
        return target
    texts = folder / "router.jsonl.gz"
    items = gold_items(f"views/{seed}/router", recipe.num_router_items, Split.ROUTER)
    _write(texts, [{"prompt": item.prompt, "completion": item.answer} for item in items])
    config = SftJob.from_values(
        {
            "experts": {slot: str(folder / slot) for slot in SLOTS},
            "router": str(folder / ROUTER_STARTS_FROM),
            "data": {"files": [str(texts)], "max_tokens": 64},
            "labels": {"folder": str(folder / "labels")},
            "training": {
                "batch_rows": recipe.router.batch_size,
                "learning_rate": recipe.router.learning_rate,
                "max_steps": recipe.router.num_steps,
                "save_every_steps": 10**6,
                "seed": seed,
                "device": "cpu",
                "tensorboard": False,
            },
            "gates": fitted_as(recipe.gates, gates),
            "report": {"enabled": False},
        }
    )
    workspace = folder / f".{name}"
    result = run(config, RunContext(workspace))
    result.artifact.rename(target)
    shutil.rmtree(workspace)
    return target


def fitted_as(stage: Stage, gates: GatesTable) -> dict[str, Any]:
    """The table `[gates]` with the steps of a stage."""
    steps = {
        "num_steps": stage.num_steps,
        "batch_targets": stage.batch_size,
        "learning_rate": stage.learning_rate,
        "warmup_steps": stage.warmup_steps,
    }
    return gates.model_dump() | steps


def gold_items(name: str, count: int, split: Split) -> list[AnyItem]:
    """Gold answers over all tasks, the keys of one split."""
    random = Random(name)  # noqa: S311 - not for secrets
    return [_any_item(random, split) for _ in range(count)]


def _any_item(random: Random, split: Split) -> AnyItem:
    task = random.choice(ROUTER_TASKS)
    if isinstance(task, Task):
        return Views(random, split).item(task)
    return make_item(random.choice(DOMAIN_TASKS[Owner.FORMAT]), Payloads(random, LabSplit.TRAIN))


def _rows_row(random: Random) -> data.Row:
    task = random.choice((Task.EVEN, Task.SKEW, Task.ROW))
    return gold_row(Views(random, None, knows_columns=False).item(task))


def _format_row(random: Random) -> data.Row:
    return gold_row(make_item(random.choice(DOMAIN_TASKS[Owner.FORMAT]), Payloads(random, LabSplit.TRAIN)))


def gold_row(item: AnyItem) -> data.Row:
    """Prompt, answer and end, of which the answer and its end are to be learnt."""
    prompt, answer = encode(item.prompt), [*encode(item.answer), EOS_ID]
    return data.Row([*prompt, *answer], [False] * len(prompt) + [True] * len(answer))


def _train_expert(
    folder: Path, name: str, make: Callable[[Random], data.Row], stage: Stage, recipe: Recipe
) -> None:
    seed_torch(name)
    model = new_model(recipe)
    rows = data.stream(make, stage.num_steps * stage.batch_size, name)
    ids, supervised = torch.from_numpy(rows.ids), torch.from_numpy(rows.supervised)

    def loss_at(step: int) -> torch.Tensor:
        batch = np.arange(step * stage.batch_size, (step + 1) * stage.batch_size)
        packing = pack(batch, rows.lengths[batch] - 1)
        mask = packing.take(supervised[:, 1:]) & packing.real
        gold = packing.take(ids[:, 1:])[mask]
        logits = model.lm_head(hidden_states(model.train(), packing.take(ids), packing)[mask])
        return lm_loss(logits, gold, torch.ones_like(gold, dtype=torch.bool))

    train([{"params": list(model.parameters())}], stage, loss_at, lambda step, loss: None)
    model.eval().save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)


def _write(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    path.write_bytes(gzip.compress(lines.encode(), mtime=0))
