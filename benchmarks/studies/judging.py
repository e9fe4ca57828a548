"""Who is right, by teacher forcing: one forward of each model over the gold answers decides all rules at once.

A greedy answer equals gold exactly when each first choice along gold is gold. A drawn answer equals gold with the
product of the chances of its tokens along gold: the exact chance, where drawing answers would only estimate it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks.studies.plan import Level, Router, experts_of
from benchmarks.studies.workshop import Workshop
from fusionroute.lab.tasks import Item
from fusionroute.router_model import Heads, load_checkpoint
from fusionroute.sampling import Sampling
from trainer.lab_beyond.first_choices import gold_of, model_rows
from trainer.lab_family.quality import row_set
from trainer.rows import RowSet

ROUTER = "router"
RULES = ("sum", "route", "select", "mixture", ROUTER)
"""The paper's sum; the routed expert without the complement; both gates; the router alone."""


@dataclass(frozen=True, slots=True)
class Judged:
    """A router on the items.

    Attributes:
        scores: by rule, of each item: 1 or 0 for the best tokens, a chance for drawn ones.
        shares: by rule with a choice of models ("route", "select"): by expert, "" for the router, its share of all
            tokens of the answers.
    """

    scores: Mapping[str, list[float]]
    shares: Mapping[str, Mapping[str, float]]


class Judge:
    """Judges routers of one family on the same items; every expert is asked once.

    Args:
        workshop: where models come from.
        items: N of them.
    """

    def __init__(self, workshop: Workshop, items: Sequence[Item]) -> None:
        self._workshop = workshop
        self._rows = row_set(items)
        self._gold = gold_of(self._rows)
        self._experts: dict[str, Tensor] = {}
        self._routers: dict[Path, tuple[Tensor, Tensor]] = {}

    def judged(self, router: Router, level: Level) -> Judged:
        """The router with the experts of a level, answering as that level draws."""
        folder = self._workshop.router(router)
        if folder not in self._routers:
            self._routers[folder] = model_rows(folder, self._rows)
        logits, states = self._routers[folder]
        names = experts_of(router)
        experts = torch.stack([self._expert(level.experts.get(name, name)) for name in names])
        rows, chosen = fused_rows(states, logits, experts, load_checkpoint(folder).heads)
        scores = {
            rule: item_scores(each, self._gold, self._rows, level.drawing) for rule, each in rows.items()
        }
        shares = {rule: _shares(models, names) for rule, models in chosen.items()}
        return Judged(scores, shares)

    def _expert(self, name: str) -> Tensor:
        if name not in self._experts:
            self._experts[name] = model_rows(self._workshop.expert(name), self._rows)[0]
        return self._experts[name]


def fused_rows(
    states: Tensor, router: Tensor, experts: Tensor, heads: Heads
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Scores ``[T, V]`` of every rule that the heads allow (method section 6), and the models chosen.

    Args:
        states: ``[T, H]`` of the router.
        router: ``[T, V]`` its logits.
        experts: ``[n, T, V]``.

    Returns:
        Scores by rule; and by rule with a choice ``[T]`` who was chosen, n for the router.
    """
    scores, n, at = heads.to_scores()(states), len(experts), torch.arange(len(states))
    route = scores[:, :n].argmax(dim=1)
    routed = experts[route, at]
    rows = {"sum": routed + router, "route": routed, ROUTER: router}
    chosen = {"route": route}
    if heads.layout.has_gate:
        gate = torch.log_softmax(scores[:, n : 2 * n + 1], dim=1)
        chosen["select"] = gate.argmax(dim=1)
        rows["select"] = torch.cat([experts, router[None]])[chosen["select"], at]
        gated = torch.log_softmax(experts[gate[:, :n].argmax(dim=1), at], dim=1)
        for_experts = torch.log1p(-gate[:, -1:].exp().clamp(max=1 - 1e-7))
        rows["mixture"] = torch.logaddexp(
            for_experts + gated, gate[:, -1:] + torch.log_softmax(router, dim=1)
        )
    return rows, chosen


def item_scores(rows: Tensor, gold: Tensor, of: RowSet, drawing: Sampling) -> list[float]:
    """The chance that each item's answer is gold: 1 or 0 at temperature 0.

    Args:
        rows: ``[T, V]`` scores at the targets.
        gold: ``[T]``.
    """
    if drawing.temperature == 0.0:
        chances = (rows.argmax(dim=1) == gold).double()
    else:
        chances = drawn_shares(rows, drawing).gather(1, gold[:, None])[:, 0]
    found = chances.numpy()
    starts = of.target_starts
    return [float(np.prod(found[start:end])) for start, end in pairwise(starts)]


def drawn_shares(rows: Tensor, drawing: Sampling) -> Tensor:
    """``[T, V]`` the chance of each token: temperature, then top-p (the fewest best tokens that reach it)."""
    shares = torch.softmax(rows.double() / drawing.temperature, dim=1)
    if drawing.top_p >= 1.0:
        return shares
    best, order = shares.sort(dim=1, descending=True, stable=True)
    before = best.cumsum(dim=1) - best
    kept = torch.zeros_like(shares).scatter(1, order, best * (before < drawing.top_p))
    return kept / kept.sum(dim=1, keepdim=True)


def _shares(models: Tensor, names: Sequence[str]) -> dict[str, float]:
    counts = torch.bincount(models, minlength=len(names) + 1).double() / len(models)
    return dict(zip([*names, ""], counts.tolist(), strict=True))
