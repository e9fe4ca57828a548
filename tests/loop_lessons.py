"""Small lessons for the training loop: random rows, random opinions of two experts, a tiny router."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

from fusionroute.router_model import ExpertRecord, Heads, Manifest, load_checkpoint, save_checkpoint
from tests.tiny_models import WIDTH, save_tiny_model, tiny_model, word_tokenizer
from trainer.config import CdpoJob, DataTable, SftJob
from trainer.loop_inputs import LoopInputs, PairLesson, SftLesson, measure_reference
from trainer.router_module import RouterModule
from trainer.rows import Labels, PairSet, Row, RowSet

SLOTS = ("math", "code")
DATA = DataTable(files=(Path("unused.jsonl"),))
EXPERTS = dict.fromkeys(SLOTS, "unused")


def random_rows(num_rows: int, seed: int, lengths: tuple[int, int] = (6, 20)) -> RowSet:
    """Rows of random words, of which the second half is to be learnt."""
    random = np.random.default_rng(seed)
    rows = []
    for _ in range(num_rows):
        length = int(random.integers(*lengths))
        ids = random.integers(2, WIDTH, size=length)
        rows.append(Row.of(ids.tolist(), [position >= length // 2 for position in range(length)]))
    return RowSet.of(rows)


def random_labels(rows: RowSet, seed: int, num_experts: int = len(SLOTS)) -> Labels:
    """Experts that agree about half of the targets."""
    random = np.random.default_rng(seed)
    shape = (rows.num_targets, num_experts)
    argmax_ids = np.where(random.random((shape[0], 1)) < 0.5, 7, random.integers(2, WIDTH, shape))
    return Labels(-random.random(shape, np.float32) * 3, argmax_ids.astype(np.int32))


def sft_lesson(num_rows: int = 24, seed: int = 1) -> SftLesson:
    rows = random_rows(num_rows, seed)
    return SftLesson(rows, random_labels(rows, seed))


def pair_lesson(num_pairs: int = 8, seed: int = 2, router: RouterModule | None = None) -> PairLesson:
    rows = random_rows(2 * num_pairs, seed)
    labels = random_labels(rows, seed)
    if router is None:
        reference = np.full(2 * num_pairs, -20, np.float32)
        return PairLesson(PairSet(rows), labels, reference, np.zeros(rows.num_targets, np.int32))
    return PairLesson(PairSet(rows), labels, *measure_reference(router, PairSet(rows)))


def sft_job(
    router: Path | str = "unused", *, training: dict[str, Any] | None = None, **tables: Any
) -> SftJob:
    return SftJob(experts=EXPERTS, data=DATA, router=str(router), training=_training(training), **tables)


def cdpo_job(
    router: Path | str = "unused", *, training: dict[str, Any] | None = None, **tables: Any
) -> CdpoJob:
    tables = {"experts": EXPERTS, "data": DATA, "pairs": DATA, **tables}
    return CdpoJob(router=str(router), training=_training(training), **tables)


def _training(changes: dict[str, Any] | None) -> dict[str, Any]:
    base = {
        "device": "cpu",
        "batch_rows": 8,
        "learning_rate": 1e-3,
        "warmup_steps": 2,
        "max_steps": 6,
        "save_every_steps": 100,
        "log_every_steps": 2,
        "tensorboard": False,
    }
    return base | (changes or {})


def sft_run(
    folder: Path,
    training: dict[str, Any] | None = None,
    lesson: SftLesson | None = None,
    dropout: float = 0.1,
    **tables: Any,
) -> Path:
    """A run's folder with the inputs of phase I. The router has dropout: a wrong generator would show."""
    router = save_tiny_model(folder / "router", attention_dropout=dropout)
    config = sft_job(router, training=training, **tables)
    LoopInputs(config, str(router), lesson or sft_lesson()).save(folder / "inputs")
    return folder


def trained_tensors(folder: Path) -> dict[str, Any]:
    """All tensors of a run's result."""
    tensors: dict[str, Any] = {}
    for name in ("model.safetensors", "routing_head.safetensors"):
        tensors |= load_file(folder / "trained" / name)
    return tensors


def losses(folder: Path, name: str = "loss") -> Sequence[float]:
    """One metric of a run, log after log; logs without it are left out."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    logs = [json.loads(line) for line in lines]
    return [log[name] for log in logs if name in log]


def save_router(folder: Path, **changes: Any) -> Path:
    """A checkpoint of phase I, as phase II starts from it."""
    torch.manual_seed(4)
    heads = Heads(torch.randn(len(SLOTS), 32), torch.randn(len(SLOTS)))
    experts = tuple(ExpertRecord(slot, slot, "vocabulary", WIDTH, slot) for slot in SLOTS)
    model = tiny_model("llama", **changes)
    save_checkpoint(folder, model, word_tokenizer(), heads, Manifest(experts, "sum", "vocabulary", WIDTH))
    return folder


def cdpo_run(
    folder: Path, training: dict[str, Any] | None = None, num_pairs: int = 12, **tables: Any
) -> Path:
    """A run's folder with the inputs of phase II."""
    router = str(save_router(folder / "router"))
    config = cdpo_job(router, training=training, **tables)
    heads = load_checkpoint(router).heads
    module = RouterModule.load(
        router, len(SLOTS), config.training, (heads.routing_weight, heads.routing_bias)
    )
    lesson = pair_lesson(num_pairs, router=module)
    LoopInputs(config, router, sft_lesson(), lesson).save(folder / "inputs")
    return folder
