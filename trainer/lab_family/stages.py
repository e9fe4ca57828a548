"""The stages, in the order in which they run: base, the three experts, the router with its gates, preferences.

Each is a function of (recipe, seed, folders) that trains one thing and saves it; `run` finds it by name.
They are run by the worker processes of `workers`.
"""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from fusionroute.lab.tasks import Owner
from fusionroute.lab.tokenizer import build_tokenizer
from trainer.lab_family import data
from trainer.lab_family.packing import pack
from trainer.lab_family.recipe import EXPERT_SLOTS, Recipe
from trainer.lab_family.router_stage import train_cdpo, train_sft
from trainer.lab_family.training import Report, StageReport, hidden_states, load, new_model, seed_torch, train
from trainer.losses import lm_loss

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

OWNER_OF_SLOT = dict(zip(EXPERT_SLOTS, (Owner.MATH, Owner.STRINGS, Owner.FORMAT), strict=True))


def run(stage: str, recipe: Recipe, seed: int, folder: Path, report: StageReport) -> dict[str, Any]:
    """Run the stage of this name.

    Args:
        stage: ``base``, an expert's slot, ``router`` (which trains the gates as well) or ``preferences``.
        folder: the family's folder: ``base``, ``experts/<slot>``, ``router_sft``, ``router``, ``data``.
        report: called with (name of what is being trained, steps taken, loss) now and then.

    Returns:
        Facts about the run: losses and seconds.
    """
    start, cpu_start = time.perf_counter(), time.process_time()
    if stage == "base":
        facts = train_base(recipe, seed, folder, partial(report, stage))
    elif stage == "router":
        facts = train_sft(recipe, seed, folder, report)
    elif stage == "preferences":
        facts = train_cdpo(recipe, seed, folder, report)
    else:
        facts = train_expert(stage, recipe, seed, folder, partial(report, stage))
    seconds = {
        "seconds": round(time.perf_counter() - start, 2),
        "cpu_seconds": round(time.process_time() - cpu_start, 2),
    }
    return {**facts, **seconds}


def train_base(recipe: Recipe, seed: int, folder: Path, report: Report) -> dict[str, Any]:
    """The common ancestor: knows a little of every domain and of composites, nothing of gaps."""
    seed_torch(f"{seed}/base")
    model = new_model(recipe)
    rows = data.stream(data.base_row, recipe.base.num_steps * recipe.base.batch_size, f"{seed}/base")
    loss = _train_on_stream(model, rows, recipe, "base", report)
    _save(model, folder / "base")
    return {"loss": loss, "num_parameters": model.num_parameters()}


def train_expert(slot: str, recipe: Recipe, seed: int, folder: Path, report: Report) -> dict[str, Any]:
    """One expert, from the base."""
    seed_torch(f"{seed}/{slot}")
    model = load(str(folder / "base"))
    owner = OWNER_OF_SLOT[slot]
    num_rows = recipe.expert.num_steps * recipe.expert.batch_size
    rows = data.stream(lambda random: data.expert_row(owner, random), num_rows, f"{seed}/{slot}")
    loss = _train_on_stream(model, rows, recipe, slot, report)
    _save(model, folder / "experts" / slot)
    return {"loss": loss}


def _train_on_stream(
    model: LlamaForCausalLM, rows: data.Rows, recipe: Recipe, name: str, report: Report
) -> float:
    """Train on rows that are each seen once, in their order."""
    stage = recipe.stage(name)
    ids, supervised = torch.from_numpy(rows.ids), torch.from_numpy(rows.supervised)
    model.train()

    def loss_at(step: int) -> torch.Tensor:
        batch = np.arange(step * stage.batch_size, (step + 1) * stage.batch_size)
        packing = pack(batch, rows.lengths[batch] - 1)
        mask = packing.take(supervised[:, 1:]) & packing.real
        gold = packing.take(ids[:, 1:])[mask]
        logits = model.lm_head(hidden_states(model, packing.take(ids), packing)[mask])
        return lm_loss(logits, gold, torch.ones_like(gold, dtype=torch.bool))

    return train([{"params": list(model.parameters())}], stage, loss_at, report)


def _save(model: LlamaForCausalLM, folder: Path) -> None:
    model.eval().save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
