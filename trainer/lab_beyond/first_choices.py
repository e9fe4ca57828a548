"""What every rule would write after each gold prefix, and what the best selection and mixture could at most.

A greedy answer equals the gold answer exactly when each first choice along it is gold; so items are judged without
decoding, as in `trainer.lab_family.quality`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from fusionroute.router_model import Heads
from trainer.frozen_models import FrozenModel
from trainer.losses import sum_gate_factor
from trainer.rows import RowSet
from trainer.run_context import RunContext
from trainer.target_states import states_at_targets

ANY_SELECTION, ANY_MIXTURE, ANY_SUM = "best selection", "best mixture", "best scaled sum"
SUM_FACTORS = (0.25, 0.5, 1.0, 2.0, 4.0)


@dataclass(frozen=True, slots=True)
class Opinions:
    """Logits of all models at the T targets of some rows.

    Attributes:
        states: ``[T, H]`` of the router.
        router: ``[T, V]``.
        experts: ``[n, T, V]``.
        gold: ``[T]``.
    """

    rows: RowSet
    states: Tensor
    router: Tensor
    experts: Tensor
    gold: Tensor


@torch.no_grad()
def model_rows(folder: Path, rows: RowSet) -> tuple[Tensor, Tensor]:
    """Logits ``[T, V]`` and hidden states ``[T, H]`` of a model at the targets."""
    model = FrozenModel.load(str(folder), folder.name)
    states = states_at_targets(model, rows, RunContext(folder), stage="first choices")
    return model.head.rows(states), states


def gold_of(rows: RowSet) -> Tensor:
    """The targets ``[T]``."""
    return torch.from_numpy(rows.ids[rows.supervised].astype(np.int64))


def first_choices(given: Opinions, heads: Heads) -> dict[str, Tensor]:
    """``[T]`` by rule: those that the heads have gates for, the router and each expert alone."""
    scores, layout = heads.to_scores()(given.states), heads.layout
    at, n = torch.arange(len(given.gold)), layout.num_experts
    routed = given.experts[scores[:, :n].argmax(dim=1), at]
    rows = {"router": given.router, "route": routed, "sum": routed + given.router}
    if layout.has_gate:
        gate = torch.log_softmax(scores[:, n : 2 * n + 1], dim=1)
        gated = given.experts[gate[:, :n].argmax(dim=1), at]
        for_experts = torch.log1p(-gate[:, -1:].exp().clamp(max=1 - 1e-7))
        rows["mixture"] = torch.logaddexp(
            for_experts + functional.log_softmax(gated, dim=1),
            gate[:, -1:] + functional.log_softmax(given.router, dim=1),
        )
        rows["select"] = torch.cat([given.experts, given.router[None]])[gate.argmax(dim=1), at]
    if layout.has_sum_gate:
        rows["gated_sum"] = routed + sum_gate_factor(scores[:, -1:]) * given.router
    return {name: fused.argmax(dim=1) for name, fused in rows.items()}


def bounds(given: Opinions) -> dict[str, Tensor]:
    """``[T]`` bool: whether gold is reached by the best choice, at this very target, of

    one model (`ANY_SELECTION`), one expert and its share in a mixture with the router (`ANY_MIXTURE`), one expert and
    one of a few factors of the complement (`ANY_SUM`).
    """
    everyone = torch.cat([given.experts, given.router[None]])
    sums = [expert + factor * given.router for expert in given.experts for factor in SUM_FACTORS]
    router = torch.softmax(given.router.double(), dim=1)
    mixed = [
        is_mixture_reaching(torch.softmax(expert.double(), dim=1), router, given.gold)
        for expert in given.experts
    ]
    return {
        ANY_SELECTION: (everyone.argmax(dim=2) == given.gold).any(dim=0),
        ANY_MIXTURE: torch.stack(mixed).any(dim=0),
        ANY_SUM: torch.stack([fused.argmax(dim=1) == given.gold for fused in sums]).any(dim=0),
    }


def is_mixture_reaching(first: Tensor, second: Tensor, gold: Tensor) -> Tensor:
    """``[T]`` bool: whether gold is a maximum of (1 - w) first + w second for some w between 0 and 1.

    Args:
        first, second: ``[T, V]`` probabilities.
        gold: ``[T]``.
    """
    start = first.gather(1, gold[:, None]) - first
    slope = (second.gather(1, gold[:, None]) - second) - start
    crossing = -start / slope
    low = torch.where(slope > 0, crossing, torch.zeros_like(slope)).amax(dim=1).clamp(min=0)
    high = torch.where(slope < 0, crossing, torch.ones_like(slope)).amin(dim=1).clamp(max=1)
    never = ((slope == 0) & (start < 0)).any(dim=1)
    return (low <= high) & ~never


def items_right(right: Tensor, rows: RowSet) -> list[bool]:
    """Whether every target of a row is right, row by row."""
    wrong = np.concatenate([[0], np.cumsum(~right.numpy())])
    starts = rows.target_starts
    return [bool(same) for same in wrong[starts[1:]] == wrong[starts[:-1]]]


def judged(given: Opinions, heads: Mapping[str, Heads], slots: Sequence[str]) -> dict[str, list[bool]]:
    """Whether each item is right: by rule (``NAME/RULE`` of several sets of heads), bound, named expert."""
    right = dict(bounds(given))
    for name, each in heads.items():
        for rule, chosen in first_choices(given, each).items():
            right[f"{name}/{rule}" if name else rule] = chosen == given.gold
    for slot, logits in zip(slots, given.experts, strict=False):
        right[slot] = logits.argmax(dim=1) == given.gold
    return {name: items_right(each, given.rows) for name, each in right.items()}
