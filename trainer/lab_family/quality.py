"""How good a family is, in seconds: exact match of greedy answers under every rule, without decoding.

A greedy answer equals the gold answer exactly when, after every prefix of the gold answer, the first
choice is the gold token (its end included). So one forward per model over the gold answers decides all
rules at once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from fusionroute.lab.tasks import Item
from trainer.lab_family import data
from trainer.lab_family.recipe import EXPERT_SLOTS
from trainer.lab_family.training import hidden_states, load
from trainer.labels import Targets, flat_outputs
from trainer.losses import sum_gate_factor

RULES = ("sum", "gated_sum", "mixture", "select", "route")
SYSTEMS = (*RULES, "router", *EXPERT_SLOTS, "base")


def exact_matches(folder: Path, items: Sequence[Item]) -> dict[str, list[bool]]:
    """For every system, whether it answers each item exactly, decoding greedily.

    Args:
        folder: a family's folder.
        items: for example `fusionroute.lab.tasks.evaluation_items()`.

    Returns:
        By name of `SYSTEMS`: the five combine rules, the router alone, each expert alone, the base.
    """
    rows = data.padded(data.written(item) for item in items)
    ids = torch.from_numpy(rows.ids)
    targets = Targets.of(ids, torch.from_numpy(rows.supervised))
    logits, states = {}, torch.empty(0)
    for name in ("base", *EXPERT_SLOTS, "router"):
        model = load(str(_folder_of(folder, name))).eval()
        states = flat_outputs(lambda ids, model=model: hidden_states(model, ids), ids, targets)  # type: ignore[misc]
        logits[name] = model.lm_head(states).detach()
    choices = {name: rows.argmax(dim=1) for name, rows in logits.items()}
    experts = torch.stack([logits[slot] for slot in EXPERT_SLOTS])
    choices |= fused_choices(states, logits["router"], experts, _heads(folder / "router"))
    return {name: _all_right(choices[name], targets) for name in SYSTEMS}


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


def _folder_of(folder: Path, name: str) -> Path:
    return folder / "experts" / name if name in EXPERT_SLOTS else folder / name


def _heads(router: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return load_file(router / "routing_head.safetensors")


def _all_right(choices: Tensor, targets: Targets) -> list[bool]:
    """Whether every target of a row was chosen, row by row."""
    right = torch.ones(targets.mask.shape, dtype=torch.bool)
    right[targets.mask] = choices == targets.gold
    return right.all(dim=1).tolist()
