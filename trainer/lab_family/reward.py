"""A reward model of a family: which of two answers is the better one, learnt from gold answers and wrong ones.

    <family>.variants/reward-<digest>/
        reward/          a sequence classifier with one label
        facts.json       seconds, loss, share of held-back pairs in the right order
        COMPLETE         written last

Wrong are the rejected answers of the family's pairs, and what experts write themselves: from the prompt, and from
places within gold answers, because that is what a choice among experts has to tell apart. It begins as the family's
base, and knows what these data say; it has not seen what only experts have learnt.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fusionroute.lab.tasks import Item
from fusionroute.lab.tokenizer import EOS_ID, PAD_ID, build_tokenizer, encode
from trainer.lab_family import cache
from trainer.lab_family.policy import SingleModel
from trainer.lab_family.recipe import EXPERT_SLOTS, Recipe, Stage
from trainer.lab_family.router_stage import MAX_ANSWER_TOKENS, gold_ids, pair_items
from trainer.lab_family.training import Report, seed_torch, train
from trainer.lab_family.variants import variants_folder

if TYPE_CHECKING:
    from transformers import LlamaForSequenceClassification

    from trainer.lab_family.build import Family

NAME = "reward"
STAGE = Stage(num_steps=80, batch_size=32, learning_rate=1e-3, warmup_steps=10)
"""Its batches are of so many pairs."""
MOST_PROMPTS = 1200
"""Of the family's prompts, those to which experts' answers are asked for: writing them takes time."""
HELD_BACK_SHARE = 0.05
CUT_SHARE = 0.5
"""Of the prompts, those whose experts' answers are asked for within the gold answer."""


@dataclass(frozen=True, slots=True)
class Pair:
    """Token ids of prompt and answer, twice; the first answer is the better one."""

    better: tuple[int, ...]
    worse: tuple[int, ...]


def reward_of(family: Family, wait_seconds: float = 3600.0) -> Path:
    """The reward model of a family: from the cache, or trained now, about ten CPU seconds at full size.

    Raises:
        FamilyIsBusy: another process builds in the family's folder and is not done after `wait_seconds`.
    """
    folder = reward_folder(family.folder)
    if not cache.is_complete(folder):
        with cache.only_builder(family.folder, wait_seconds, lambda: None):
            if not cache.is_complete(folder):
                partial = cache.begin(folder)
                facts = train_reward(family, partial / NAME, lambda step, loss: None)
                cache.finish(partial, folder, {"name": NAME, "seed": family.facts["seed"], **facts})
    return folder / NAME


def reward_folder(family: Path) -> Path:
    """Where it lies, or will lie, with its facts."""
    code = cache.digest_of_sources([Path(__file__)])
    decisive = f"{family.name} {code} {metadata.version('torch')} {metadata.version('transformers')}"
    return variants_folder(family) / f"{NAME}-{hashlib.sha256(decisive.encode()).hexdigest()[:12]}"


def train_reward(family: Family, output: Path, report: Report, stage: Stage = STAGE) -> dict[str, Any]:
    """Trains one into an empty folder.

    Returns:
        Number of pairs, loss, the share of pairs held back from training that it orders rightly, seconds.
    """
    start, cpu_start = time.perf_counter(), time.process_time()
    recipe, seed = Recipe.from_json(family.facts["recipe"]), family.facts["seed"]
    seed_torch(f"{seed}/{NAME}")
    pairs = list(dict.fromkeys(_pairs(family, recipe, seed)))
    random = Random(f"{seed}/{NAME}/order")  # noqa: S311 - not for secrets
    random.shuffle(pairs)
    num_held_back = max(1, int(HELD_BACK_SHARE * len(pairs)))
    held_back, learnt = pairs[:num_held_back], pairs[num_held_back:]
    model = _classifier(family.base)
    model.train()

    def loss_at(step: int) -> Tensor:
        return bradley_terry(_margins(model, random.choices(learnt, k=stage.batch_size)))

    loss = train([{"params": list(model.parameters())}], stage, loss_at, report)
    model.eval()
    with torch.no_grad():
        num_right = sum(int((_margins(model, held_back[at : at + 256]) > 0).sum())
                        for at in range(0, len(held_back), 256))  # fmt: skip
    model.save_pretrained(output)
    build_tokenizer().save_pretrained(output)
    return {
        "num_pairs": len(learnt),
        "loss": loss,
        "num_held_back": len(held_back),
        "held_back_right": round(num_right / len(held_back), 4),
        "seconds": round(time.perf_counter() - start, 2),
        "cpu_seconds": round(time.process_time() - cpu_start, 2),
    }


def bradley_terry(margins: Tensor) -> Tensor:
    """Mean of -log sigmoid(reward of the better one - reward of the worse one).

    Args:
        margins: ``[B]`` reward of the better answers minus that of the worse ones.
    """
    return -torch.nn.functional.logsigmoid(margins).mean()


def _classifier(base: Path) -> LlamaForSequenceClassification:
    from transformers import LlamaForSequenceClassification
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()  # that the head is new is no news
    try:
        return LlamaForSequenceClassification.from_pretrained(
            str(base), num_labels=1, local_files_only=True, dtype=torch.float32
        )
    finally:
        logging.set_verbosity(before)


def _margins(model: LlamaForSequenceClassification, pairs: Sequence[Pair]) -> Tensor:
    """``[B]`` reward of the better ones minus that of the worse ones."""
    rows = [*(pair.better for pair in pairs), *(pair.worse for pair in pairs)]
    width = max(map(len, rows))
    ids = torch.tensor([[*row, *[PAD_ID] * (width - len(row))] for row in rows])
    rewards = model(input_ids=ids, attention_mask=(ids != PAD_ID).long(), use_cache=False).logits[:, 0]
    margins: Tensor = rewards[: len(pairs)] - rewards[len(pairs) :]
    return margins


def _pairs(family: Family, recipe: Recipe, seed: int) -> Iterator[Pair]:
    """The family's own pairs, then gold answers beside experts' wrong ones."""
    with gzip.open(family.data / "pairs.jsonl.gz", "rt", encoding="utf-8") as lines:
        for row in map(json.loads, lines):
            prompt = encode(row["prompt"])
            end = [EOS_ID] if row.get("rejected_ended", True) else []
            yield Pair((*prompt, *encode(row["chosen"]), EOS_ID), (*prompt, *encode(row["rejected"]), *end))
    items = pair_items(recipe, seed)[:MOST_PROMPTS]
    random = Random(f"{seed}/{NAME}/cuts")  # noqa: S311 - not for secrets
    starts = [(*encode(item.prompt), *gold_ids(item)[: _cut(item, random)]) for item in items]
    for slot in EXPERT_SLOTS:
        answers = SingleModel(family.folder / "experts" / slot).answers(starts, MAX_ANSWER_TOKENS)
        for item, begun, answer in zip(items, starts, answers, strict=True):
            gold = (*encode(item.prompt), *gold_ids(item))
            written = (*begun, *answer)
            if written != gold and PAD_ID not in written:
                yield Pair(gold, written)


def _cut(item: Item, random: Random) -> int:
    """How many tokens of the gold answer stand already when an expert goes on."""
    return random.randrange(len(item.answer)) if random.random() < CUT_SHARE else 0
