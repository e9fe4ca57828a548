"""Experts beyond the family's three, made by its own recipe: halves of a domain, bad ones, noisy ones.

add_sub mul | rev_up sort | box_ans two   a half of a domain
untrained                                 fresh weights
liar                                      every domain task, answered wrongly and surely
NAME~SIGMA                                NAME with noise of SIGMA standard deviations on every matrix
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from fusionroute.lab.tasks import DOMAIN_TASKS, Item, Owner, Payloads, Split, make_item
from fusionroute.lab.tokenizer import ALPHABET, build_tokenizer
from trainer.lab_family import data
from trainer.lab_family.packing import pack
from trainer.lab_family.recipe import EXPERT_SLOTS, Recipe
from trainer.lab_family.training import hidden_states, load, new_model, seed_torch, train
from trainer.losses import lm_loss

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

UNTRAINED, LIAR, NOISE = "untrained", "liar", "~"


@dataclass(frozen=True, slots=True)
class Half:
    """A part of a domain: its owner, and the prompts that belong to it."""

    owner: Owner
    prompts: re.Pattern[str]


HALVES = {
    "add_sub": Half(Owner.MATH, re.compile(r"\d[+-]\d")),
    "mul": Half(Owner.MATH, re.compile(r"\d\*\d")),
    "rev_up": Half(Owner.STRINGS, re.compile(r"\b(rev|up) ")),
    "sort": Half(Owner.STRINGS, re.compile(r"\bsort ")),
    "box_ans": Half(Owner.FORMAT, re.compile(r"^(?!two: )")),
    "two": Half(Owner.FORMAT, re.compile(r"^two: ")),
}


def make_expert(name: str, recipe: Recipe, seed: int, family: Path, target: Path) -> None:
    """Makes the expert of this name, which is none of the family's, into `target`.

    Args:
        family: folder of the lab family whose base it starts from.

    Raises:
        KeyError: there is no such expert.
    """
    if NOISE in name:
        clean, _, sigma = name.partition(NOISE)
        model = load(str(family / "experts" / clean))
        add_noise(dict(model.named_parameters()), float(sigma), f"{seed}/{name}")
    elif name == UNTRAINED:
        seed_torch(f"{seed}/{name}")
        model = new_model(recipe)
    else:
        make = liar_row if name == LIAR else half_row(HALVES[name])
        model = _trained(family / "base", make, recipe, f"{seed}/studies/{name}")
    model.eval().save_pretrained(target)
    build_tokenizer().save_pretrained(target)


def folder_of_family(name: str, family: Path) -> Path | None:
    """Where an expert lies that the family has itself; None for others."""
    return family / "experts" / name if name in EXPERT_SLOTS else None


@torch.no_grad()
def add_noise(parameters: dict[str, Tensor], sigma: float, name: str) -> None:
    """Adds to every matrix normal noise of `sigma` times the standard deviation of its own weights; in place."""
    seed_torch(name)
    for weights in parameters.values():
        if weights.ndim > 1:
            weights.add_(torch.randn_like(weights) * weights.std() * sigma)


def half_row(half: Half) -> Callable[[Random], data.Row]:
    """Rows of the recipe's expert for the domain, of which only those of the half are kept."""

    def make(random: Random) -> data.Row:
        while True:
            row = data.expert_row(half.owner, random)
            if half.prompts.search(text_of(row.ids)):
                return row

    return make


def text_of(ids: list[int]) -> str:
    """Prompt and answer of a row, without its end."""
    return "".join(ALPHABET[token - 2] for token in ids if token >= 2)


def liar_row(random: Random) -> data.Row:
    """A plain domain item whose answer is a wrong one, the same one each time."""
    task = random.choice([task for tasks in DOMAIN_TASKS.values() for task in tasks])
    return data.written(lie(make_item(task, Payloads(random, Split.TRAIN, all_facts=True))))


def lie(item: Item) -> Item:
    """A domain item with a wrong answer: one too many, another operation, another format."""
    question = item.prompt.removesuffix("=")
    if item.task in DOMAIN_TASKS[Owner.MATH]:
        answer = str(int(item.answer) + 1)
    elif item.task in DOMAIN_TASKS[Owner.STRINGS]:
        letters = question.partition(" ")[2]
        answer = {"rev": letters, "sort": letters.upper(), "up": letters[::-1]}[item.task]
    else:
        word = question.partition(": ")[2]
        answer = {"fbox": f"Answer: {word}.", "fans": f"{word} {word}", "ftwo": f"[{word}]"}[item.task]
    return replace(item, answer=answer, owners=item.eos_owner * len(answer))


def _trained(base: Path, make: Callable[[Random], data.Row], recipe: Recipe, name: str) -> LlamaForCausalLM:
    """From the base, on rows that are each seen once, as the recipe trains experts."""
    seed_torch(name)
    stage, model = recipe.expert, load(str(base))
    rows = data.stream(make, stage.num_steps * stage.batch_size, name)
    ids, supervised = torch.from_numpy(rows.ids), torch.from_numpy(rows.supervised)
    model.train()

    def loss_at(step: int) -> Tensor:
        batch = np.arange(step * stage.batch_size, (step + 1) * stage.batch_size)
        packing = pack(batch, rows.lengths[batch] - 1)
        mask = packing.take(supervised[:, 1:]) & packing.real
        gold = packing.take(ids[:, 1:])[mask]
        logits = model.lm_head(hidden_states(model, packing.take(ids), packing)[mask])
        return lm_loss(logits, gold, torch.ones_like(gold, dtype=torch.bool))

    train([{"params": list(model.parameters())}], stage, loss_at, lambda step, loss: None)
    return model
