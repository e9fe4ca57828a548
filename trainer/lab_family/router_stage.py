"""The router of the family: phase I (method section 2) from the format expert, then its gates (section 6)."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from trainer.lab_family import data
from trainer.lab_family.packing import pack
from trainer.lab_family.recipe import EXPERT_SLOTS, Recipe, Stage
from trainer.lab_family.router_checkpoint import ROUTER_STARTS_FROM, heads_of, save_router
from trainer.lab_family.training import Report, StageReport, hidden_states, load, seed_torch, train
from trainer.labels import ExpertLabels, Targets, flat_outputs, gold_logprobs, label
from trainer.losses import LAMBDA, gate_loss, sft_loss, sum_gate_loss

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

HEAD_LEARNING_RATE_FACTOR = 3.0


@dataclass(frozen=True, slots=True)
class Lesson:
    """What the router learns from: gold answers and the frozen experts' opinions about them."""

    ids: Tensor
    lengths: NDArray[np.int64]
    targets: Targets
    labels: ExpertLabels


def train_router(recipe: Recipe, seed: int, folder: Path, report: StageReport) -> dict[str, Any]:
    """Label the gold answers, train router and routing head on L_SFT, then the gates; save the checkpoint."""
    seed_torch(f"{seed}/router")
    start = time.perf_counter()
    lesson = prepare_lesson(recipe, seed, folder)
    labelled = time.perf_counter()
    model = load(str(folder / "experts" / ROUTER_STARTS_FROM))
    routing = _zero_head(recipe.hidden_size, len(EXPERT_SLOTS))
    facts = train_sft(recipe, seed, model, routing, lesson, partial(report, "router"))
    trained = time.perf_counter()
    gate, sum_gate, gate_facts = train_gates(recipe, seed, model, routing, lesson, partial(report, "gates"))
    gated = time.perf_counter()
    facts = {**facts, **gate_facts}
    heads = heads_of(routing, gate, sum_gate)
    save_router(folder, model, heads, recipe=recipe, seed=seed, metrics=facts)
    seconds = {
        "label_seconds": round(labelled - start, 2),
        "sft_seconds": round(trained - labelled, 2),
        "gates_seconds": round(gated - trained, 2),
    }
    return {**facts, **seconds}


def prepare_lesson(recipe: Recipe, seed: int, folder: Path) -> Lesson:
    """The router's gold answers over all tasks, labelled by the three experts."""
    rows = data.stream(data.router_row, recipe.num_router_items, f"{seed}/router")
    ids = torch.from_numpy(rows.ids)
    targets = Targets.of(ids, torch.from_numpy(rows.supervised))
    experts = [_logits_of(load(str(folder / "experts" / slot)).eval()) for slot in EXPERT_SLOTS]
    labels = label(experts, ids, targets, keep_rows=True)
    return Lesson(ids, rows.lengths, targets, labels)


def train_sft(
    recipe: Recipe, seed: int, model: LlamaForCausalLM, routing: nn.Linear, lesson: Lesson, report: Report
) -> dict[str, float]:
    """Phase I: L_LM + lambda L_expert, epoch after epoch, the routing head at three times the rate."""
    stage, targets, labels = recipe.router, lesson.targets, lesson.labels
    order = _epochs(len(lesson.ids), stage, f"{seed}/router/order")
    parts: dict[str, float] = {}
    model.train()

    def loss_at(step: int) -> Tensor:
        rows = order[step * stage.batch_size : (step + 1) * stage.batch_size]
        packing = pack(rows.numpy(), lesson.lengths[rows.numpy()] - 1)
        mask = packing.take(targets.mask) & packing.real
        flat = packing.take(targets.flat_index)[mask]
        hidden = hidden_states(model, packing.take(lesson.ids), packing)[mask]
        loss, language, expert = sft_loss(
            model.lm_head(hidden),
            routing(hidden),
            targets.gold[flat],
            labels.gold_logprobs[flat],
            labels.argmax_ids[flat],
            torch.ones_like(flat, dtype=torch.bool),
            weight=LAMBDA,
        )
        parts.update(lm_loss=language.item(), expert_loss=expert.item())
        return loss

    head_group = {
        "params": list(routing.parameters()),
        "lr": stage.learning_rate * HEAD_LEARNING_RATE_FACTOR,
    }
    loss = train([{"params": list(model.parameters())}, head_group], stage, loss_at, report)
    return {"loss": loss, **parts}


def train_gates(
    recipe: Recipe, seed: int, model: LlamaForCausalLM, routing: nn.Linear, lesson: Lesson, report: Report
) -> tuple[nn.Linear, nn.Linear, dict[str, float]]:
    """The mixture gate (n + 1 rows) and the sum gate (one row), on hidden states without gradient.

    The router stands still, so one pass gives all that both need.
    """
    stage, gold, labels = recipe.gates, lesson.targets.gold, lesson.labels
    model.eval()
    hidden = flat_outputs(lambda ids: hidden_states(model, ids), lesson.ids, lesson.targets)
    with torch.no_grad():
        router_rows = model.lm_head(hidden)
        chosen = routing(hidden).argmax(dim=1)
    assert labels.rows is not None  # prepare_lesson keeps them
    expert_rows = labels.rows[chosen, torch.arange(len(chosen))]
    router_gold = gold_logprobs(router_rows, gold)
    order = _epochs(len(gold), stage, f"{seed}/gates/order")
    gate, sum_gate = _zero_head(recipe.hidden_size, len(EXPERT_SLOTS) + 1), _zero_head(recipe.hidden_size, 1)
    all_count = torch.ones(min(stage.batch_size, len(gold)), dtype=torch.bool)
    parts: dict[str, float] = {}

    def loss_at(step: int) -> Tensor:
        flat = order[step * stage.batch_size : (step + 1) * stage.batch_size]
        states = hidden[flat]
        mixture = gate_loss(gate(states), labels.gold_logprobs[flat], router_gold[flat], all_count)
        summed = sum_gate_loss(
            sum_gate(states)[:, 0], expert_rows[flat], router_rows[flat], gold[flat], all_count
        )
        parts.update(gate_loss=mixture.item(), sum_gate_loss=summed.item())
        return mixture + summed

    parameters = [*gate.parameters(), *sum_gate.parameters()]
    # the gates share no parameters, so one optimiser and one sum of losses trains each as if it were alone
    train([{"params": parameters}], stage, loss_at, report, weight_decay=0.0)
    return gate, sum_gate, parts


def _zero_head(hidden_size: int, num_outputs: int) -> nn.Linear:
    head = nn.Linear(hidden_size, num_outputs)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    return head


def _epochs(num_items: int, stage: Stage, name: str) -> Tensor:
    """Indices of items, epoch after epoch, each in a fresh order and cut to whole batches."""
    random = Random(name)  # noqa: S311 - not for secrets
    order: list[int] = []
    num_wanted = stage.num_steps * stage.batch_size
    num_whole = max(1, num_items // stage.batch_size) * stage.batch_size
    while len(order) < num_wanted:
        epoch = list(range(num_items))
        random.shuffle(epoch)
        order.extend(epoch[:num_whole])
    return torch.tensor(order[:num_wanted])


def _logits_of(model: LlamaForCausalLM) -> Callable[[Tensor], Tensor]:
    def compute(ids: Tensor) -> Tensor:
        logits: Tensor = model.lm_head(hidden_states(model, ids))
        return logits

    return compute
