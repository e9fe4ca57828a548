"""The routers of the family, made by the same jobs that users submit: SFT with its gates, pairs, CDPO.

data/router.jsonl.gz   gold answers over all tasks     ->  router_sft/   phase I and gates
data/prompts.jsonl.gz  fresh ones with their gold answers
data/pairs.jsonl.gz    wrong answers of router_sft     ->  router/       phase II, its own gates
labels/                what the experts say about both; kept for variants
"""

from __future__ import annotations

import gzip
import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from random import Random
from typing import Any

from fusionroute.lab.tasks import TASKS, Item, Payloads, Split, make_item
from fusionroute.lab.tokenizer import EOS_ID, PAD_ID, build_tokenizer, encode
from trainer.config import CdpoJob, JobConfig, SftJob
from trainer.lab_family.policy import FusedPolicy
from trainer.lab_family.recipe import EXPERT_SLOTS, Recipe, Stage
from trainer.lab_family.training import StageReport, seed_torch
from trainer.run import run
from trainer.run_context import RunContext, RunProgress

ROUTER_STARTS_FROM = "format"
MAX_ANSWER_TOKENS = 24
MAX_ROW_TOKENS = 96
SAMPLE_TEMPERATURE = 1.0
LABELS = "labels"
LABEL_BATCH_TOKENS = 2048  # small enough for a core's cache: half the time of 16384


def train_sft(recipe: Recipe, seed: int, folder: Path, report: StageReport) -> dict[str, Any]:
    """Phase I with its gates: `router_sft`."""
    seed_torch(f"{seed}/router")
    data = folder / "data" / "router.jsonl.gz"
    items = _items(f"{seed}/router", recipe.num_router_items)
    write_rows(data, _written(items))
    config = SftJob.from_values(
        {
            **experts_and_data(folder, [data], folder / LABELS),
            "router": str(folder / "experts" / ROUTER_STARTS_FROM),
            "training": {**training_of(recipe.router, seed), "max_steps": recipe.router.num_steps},
            "gates": _gates(recipe.gates),
        }
    )
    stages = {"training": ("router", recipe.router), "gates": ("gates", recipe.gates)}
    return run_job(config, folder, "router_sft", report, stages)


def train_cdpo(recipe: Recipe, seed: int, folder: Path, report: StageReport) -> dict[str, Any]:
    """Pairs from the mistakes of the fused phase-I policy, then phase II: `router`."""
    seed_torch(f"{seed}/preferences")
    pairs = folder / "data" / "pairs.jsonl.gz"
    items = pair_items(recipe, seed)
    write_rows(folder / "data" / "prompts.jsonl.gz", _written(items))
    policy = FusedPolicy(folder / "router_sft", [folder / "experts" / slot for slot in EXPERT_SLOTS])
    found = wrong_answers(policy, items, seed)
    write_rows(pairs, found)
    values = cdpo_values(recipe, seed, folder, folder / LABELS) | {"gates": _gates(recipe.gates)}
    stages = {"training": ("preferences", recipe.preferences)}
    facts = run_job(CdpoJob.from_values(values), folder, "router", report, stages)
    return {"num_pairs": len(found), **facts}


def cdpo_values(recipe: Recipe, seed: int, folder: Path, labels: Path) -> dict[str, Any]:
    """Phase II of a family as a configuration's plain values, without its gates."""
    stage = recipe.preferences
    return {
        **experts_and_data(folder, [folder / "data" / "router.jsonl.gz"], labels),
        "router": str(folder / "router_sft"),
        "pairs": {"files": [str(folder / "data" / "pairs.jsonl.gz")], "max_tokens": MAX_ROW_TOKENS},
        "training": {
            **training_of(stage, seed),
            "batch_rows": 3 * stage.batch_size,  # a pair is two rows, and beside it stands a gold answer
            "epochs": recipe.preference_epochs,
        },
    }


def wrong_answers(policy: FusedPolicy, items: list[Item], seed: int) -> list[dict[str, Any]]:
    """Pairs of gold answer and the policy's own wrong one: the greedy one, else one drawn at temperature 1."""
    prompts, golds = [encode(item.prompt) for item in items], [gold_ids(item) for item in items]
    answers = policy.answers(prompts, MAX_ANSWER_TOKENS)
    right = [place for place, gold in enumerate(golds) if answers[place] == gold]
    drawn = policy.answers([prompts[place] for place in right], MAX_ANSWER_TOKENS, SAMPLE_TEMPERATURE, seed)
    for place, answer in zip(right, drawn, strict=True):
        answers[place] = answer
    return pairs_of(items, answers)


def pairs_of(items: Iterable[Item], answers: Iterable[list[int]]) -> list[dict[str, Any]]:
    """Rows of pairs: each item's gold answer and the given one where that is another and can be written as text."""
    tokenizer = build_tokenizer()
    pairs: list[dict[str, Any]] = []
    for item, answer in zip(items, answers, strict=True):
        ended = answer[-1] == EOS_ID
        written = answer[:-1] if ended else answer
        if answer != gold_ids(item) and written and PAD_ID not in written:
            pair = {"prompt": item.prompt, "chosen": item.answer, "rejected": tokenizer.decode(written)}
            pairs.append(pair if ended else {**pair, "rejected_ended": False})
    return pairs


def gold_ids(item: Item) -> list[int]:
    """The right answer as tokens, with its end."""
    return [*encode(item.answer), EOS_ID]


def pair_items(recipe: Recipe, seed: int) -> list[Item]:
    """The items of `data/prompts.jsonl.gz`."""
    return _items(f"{seed}/pairs", recipe.num_pair_prompts)


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """JSONL, gzipped, the same bytes for the same rows."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(dict(row), ensure_ascii=False) + "\n" for row in rows)
    path.write_bytes(gzip.compress(lines.encode(), mtime=0))


def _items(name: str, count: int) -> list[Item]:
    random = Random(name)  # noqa: S311 - not for secrets
    return [make_item(random.choice(tuple(TASKS)), Payloads(random, Split.TRAIN)) for _ in range(count)]


def _written(items: Iterable[Item]) -> list[dict[str, Any]]:
    return [{"prompt": item.prompt, "completion": item.answer} for item in items]


def experts_and_data(folder: Path, data: Sequence[Path], labels: Path) -> dict[str, Any]:
    """What all jobs of a family have in common, as a configuration's plain values."""
    return {
        "experts": {
            slot: {"model": str(folder / "experts" / slot), "name": f"lab-{slot}"} for slot in EXPERT_SLOTS
        },
        "data": {"files": [str(path) for path in data], "max_tokens": MAX_ROW_TOKENS},
        "labels": {"folder": str(labels), "batch_tokens": LABEL_BATCH_TOKENS},
        "report": {"enabled": False},
    }


def training_of(stage: Stage, seed: int) -> dict[str, Any]:
    """The loop of a stage, as a configuration's plain values."""
    return {
        "batch_rows": stage.batch_size,
        "learning_rate": stage.learning_rate,
        "warmup_steps": stage.warmup_steps,
        "save_every_steps": 10**6,
        "seed": seed,
        "device": "cpu",
        "tensorboard": False,
    }


def _gates(stage: Stage) -> dict[str, Any]:
    return {
        "num_steps": stage.num_steps,
        "batch_targets": stage.batch_size,
        "learning_rate": stage.learning_rate,
        "warmup_steps": stage.warmup_steps,
    }


def run_job(
    config: JobConfig,
    folder: Path,
    name: str,
    report: StageReport,
    stages: Mapping[str, tuple[str, Stage]],
) -> dict[str, Any]:
    """Run a job and give what it made its name; `stages` says which of its stages are reported, and as what."""

    def tell(progress: RunProgress) -> None:
        if progress.stage in stages and progress.num_steps > 0:
            as_name, stage = stages[progress.stage]
            share = progress.step / progress.num_steps
            report(as_name, round(share * stage.num_steps), progress.loss or 0.0)

    workspace = folder / f".{name}"
    result = run(config, RunContext(workspace, tell))
    result.artifact.rename(folder / name)
    shutil.rmtree(workspace)
    return dict(result.metrics)
