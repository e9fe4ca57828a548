"""How good a family is, in seconds: exact match of greedy answers under every rule, without decoding.

A greedy answer equals the gold answer exactly when, after every prefix of the gold answer, the first
choice is the gold token (its end included). So one forward per model over the gold answers decides all
rules at once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fusionroute.lab.tasks import Item
from fusionroute.router_model import load_checkpoint
from trainer.frozen_models import FrozenModel
from trainer.lab_family import data
from trainer.lab_family.recipe import EXPERT_SLOTS
from trainer.losses import sum_gate_factor
from trainer.rows import Row, RowSet
from trainer.run_context import RunContext
from trainer.target_states import states_at_targets

RULES = ("sum", "gated_sum", "mixture", "select", "route")
ROUTERS = {"": "router_sft", "cdpo/": "router"}
"""Folder of each router, by what stands before the names of its systems."""

SYSTEMS = (
    *(f"{prefix}{name}" for prefix in ROUTERS for name in (*RULES, "router")),
    *EXPERT_SLOTS,
    "base",
)


def exact_matches(folder: Path, items: Sequence[Item]) -> dict[str, list[bool]]:
    """For every system, whether it answers each item exactly, decoding greedily.

    Args:
        folder: a family's folder.
        items: for example `fusionroute.lab.tasks.evaluation_items()`.

    Returns:
        By name of `SYSTEMS`: the five combine rules and the router alone, of phase I and (``cdpo/``) of phase
        II; each expert alone; the base.
    """
    rows = row_set(items)
    gold = torch.from_numpy(rows.ids[rows.supervised].astype(np.int64))
    choices: dict[str, Tensor] = {}
    expert_rows = []
    for name in ("base", *EXPERT_SLOTS):
        logits, _ = _logits(folder / ("experts" if name in EXPERT_SLOTS else "") / name, rows)
        choices[name] = logits.argmax(dim=1)
        if name in EXPERT_SLOTS:
            expert_rows.append(logits)
    experts = torch.stack(expert_rows)
    for prefix, name in ROUTERS.items():
        router_rows, states = _logits(folder / name, rows)
        heads = load_checkpoint(folder / name).heads.tensors()
        found = fused_choices(states, router_rows, experts, heads) | {"router": router_rows.argmax(dim=1)}
        choices |= {f"{prefix}{system}": chosen for system, chosen in found.items()}
    return {name: _all_right(choices[name] == gold, rows) for name in SYSTEMS}


def row_set(items: Sequence[Item]) -> RowSet:
    """Items with every token of the answer and its end as targets."""
    written = (data.written(item) for item in items)
    return RowSet.of(Row.of(row.ids, row.supervised) for row in written)


def fused_choices(
    states: Tensor, router_rows: Tensor, expert_rows: Tensor, heads: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """First choice of every combine rule of method section 6, ``[T]`` each.

    Args:
        states: ``[T, H]`` the router's hidden states.
        router_rows: ``[T, V]``.
        expert_rows: ``[n, T, V]``.
        heads: tensors of ``routing_head.safetensors``.
    """

    def scores(head: str) -> Tensor:
        return torch.nn.functional.linear(states, heads[f"{head}.weight"], heads[f"{head}.bias"])

    tokens, num_experts = torch.arange(len(states)), len(expert_rows)
    routed = expert_rows[scores("routing").argmax(dim=1), tokens]
    gate = torch.log_softmax(scores("gate"), dim=1)
    router_share = gate[:, -1:]
    expert_share = torch.log1p(-router_share.exp().clamp(max=1 - 1e-7))
    gated = expert_rows[gate[:, :num_experts].argmax(dim=1), tokens]
    mixture = torch.logaddexp(
        expert_share + torch.log_softmax(gated, dim=1), router_share + torch.log_softmax(router_rows, dim=1)
    )
    everyone = torch.cat([expert_rows, router_rows[None]])
    rows = {
        "sum": routed + router_rows,
        "gated_sum": routed + sum_gate_factor(scores("sum_gate")) * router_rows,
        "mixture": mixture,
        "select": everyone[gate.argmax(dim=1), tokens],
        "route": routed,
    }
    return {name: fused.argmax(dim=1) for name, fused in rows.items()}


@torch.no_grad()
def _logits(folder: Path, rows: RowSet) -> tuple[Tensor, Tensor]:
    """Logits ``[T, V]`` and hidden states ``[T, H]`` of a model at the targets; the lab's are small."""
    model = FrozenModel.load(str(folder), folder.name)
    states = states_at_targets(model, rows, RunContext(folder), stage="quality")
    return model.head.rows(states), states


def _all_right(right: Tensor, rows: RowSet) -> list[bool]:
    """Whether every target of a row was chosen, row by row."""
    wrong = np.concatenate([[0], np.cumsum(~right.numpy())])
    starts = rows.target_starts
    return [bool(same) for same in wrong[starts[1:]] == wrong[starts[:-1]]]
