"""Who was right, token by token: the router alone, the expert it chose, or the sum of both.

The *owner* of a target is the expert that knows it best: among the experts whose own first choice is the target, the
one that gives it the highest log-probability; `nobody` where no expert would have written it. The table by owner
shows what fusion gains (targets of nobody) and what it costs (targets that the chosen expert knows and the router
does not).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from trainer.frozen_models import FrozenModel
from trainer.rows import RowSet
from trainer.run_context import RunContext
from trainer.target_states import states_at_targets

NOBODY = "nobody"
CHUNK_TOKENS = 256


@dataclass(frozen=True, slots=True)
class OwnerRow:
    """The targets of one owner; shares and means are over them, 0 where there are none.

    Attributes:
        owner: a slot, or "nobody".
        num_targets: how many targets are its own.
        shared: share of them that another expert would have written too.
        selected: share routed to each slot.
        router_right, expert_right, sum_right: share that the router alone, the chosen expert alone and the sum of
            their logits would have written.
        router_logprob, expert_logprob, sum_logprob: mean log-probability of the target under each.
    """

    owner: str
    num_targets: int
    shared: float
    selected: dict[str, float]
    router_right: float
    expert_right: float
    sum_right: float
    router_logprob: float
    expert_logprob: float
    sum_logprob: float


@dataclass(frozen=True, slots=True)
class Ownership:
    """The table: one row for each slot in the checkpoint's order, then one for nobody."""

    slots: tuple[str, ...]
    owners: tuple[OwnerRow, ...]
    num_rows: int

    def to_json(self) -> dict[str, Any]:
        """Plain values, as `ownership.json` and the report have them."""
        return {
            "slots": list(self.slots),
            "num_rows": self.num_rows,
            "owners": [asdict(row) for row in self.owners],
        }


class _Opinion(NamedTuple):
    """Of one model about targets: logits of all entries, log p of the target, whether it is the first choice."""

    rows: Tensor
    logprobs: Tensor
    right: Tensor


class _Verdicts(NamedTuple):
    """About targets, each ``[T]`` or, of the experts, ``[T, n]``."""

    routes: Tensor
    expert_logprobs: Tensor
    experts_right: Tensor
    router_logprobs: Tensor
    router_right: Tensor
    sum_logprobs: Tensor
    sum_right: Tensor


def measure_ownership(
    rows: RowSet,
    router: FrozenModel,
    scores: Callable[[Tensor], Tensor],
    experts: Sequence[FrozenModel],
    context: RunContext,
    chunk_tokens: int = CHUNK_TOKENS,
) -> Ownership:
    """The table for some rows, teacher-forced.

    Args:
        rows: a few hundred; the hidden states of all their targets are held at once.
        router: the checkpoint's causal LM.
        scores: its routing head, from hidden states ``[T, H]`` to ``[T, >= n]``, of which the first n columns count.
        experts: n of them, in the checkpoint's order.
        chunk_tokens: targets whose vocabulary rows exist at a time, for two models at once.
    """
    gold = torch.from_numpy(np.asarray(rows.ids[rows.supervised], dtype=np.int64))
    router_states = states_at_targets(router, rows, context, stage="report")
    expert_states = [states_at_targets(expert, rows, context, stage="report") for expert in experts]
    pieces = []
    for first in range(0, len(gold), chunk_tokens):
        context.stop.check()
        some = slice(first, first + chunk_tokens)
        states = [each[some] for each in expert_states]
        pieces.append(_verdicts(gold[some], router, router_states[some], scores, experts, states))
    slots = tuple(expert.record.slot for expert in experts)
    if not pieces:
        empty = torch.zeros(0, len(slots))
        pieces = [_Verdicts(empty[:, 0].long(), empty, empty.bool(), *([empty[:, 0]] * 4))]
    return table_by_owner(slots, len(rows), *(torch.cat(parts) for parts in zip(*pieces, strict=True)))


def owners_of(expert_logprobs: Tensor, experts_right: Tensor) -> Tensor:
    """Owner ``[T]`` of each target as an index, n for nobody.

    Args:
        expert_logprobs: ``[T, n]`` log-probability of the target under each expert.
        experts_right: ``[T, n]`` bool, whether the target is the expert's own first choice.
    """
    known = expert_logprobs.masked_fill(~experts_right, -torch.inf)
    return torch.where(experts_right.any(dim=1), known.argmax(dim=1), experts_right.shape[1])


def table_by_owner(
    slots: tuple[str, ...],
    num_rows: int,
    routes: Tensor,
    expert_logprobs: Tensor,
    experts_right: Tensor,
    router_logprobs: Tensor,
    router_right: Tensor,
    sum_logprobs: Tensor,
    sum_right: Tensor,
) -> Ownership:
    """The table from what is known about T targets: ``[T]`` each, ``[T, n]`` of the experts."""
    owners = owners_of(expert_logprobs, experts_right)
    chosen_right = experts_right.gather(1, routes[:, None])[:, 0]
    chosen_logprobs = expert_logprobs.gather(1, routes[:, None])[:, 0]
    table = []
    for index, owner in enumerate((*slots, NOBODY)):
        own = owners == index

        def mean(values: Tensor, own: Tensor = own) -> float:
            return float(values[own].double().mean()) if bool(own.any()) else 0.0

        table.append(
            OwnerRow(
                owner=owner,
                num_targets=int(own.sum()),
                shared=mean(experts_right.sum(dim=1) > 1),
                selected={slot: mean(routes == which) for which, slot in enumerate(slots)},
                router_right=mean(router_right),
                expert_right=mean(chosen_right),
                sum_right=mean(sum_right),
                router_logprob=mean(router_logprobs),
                expert_logprob=mean(chosen_logprobs),
                sum_logprob=mean(sum_logprobs),
            )
        )
    return Ownership(slots, tuple(table), num_rows)


@torch.no_grad()
def _verdicts(
    gold: Tensor,
    router: FrozenModel,
    router_states: Tensor,
    scores: Callable[[Tensor], Tensor],
    experts: Sequence[FrozenModel],
    expert_states: Sequence[Tensor],
) -> _Verdicts:
    own = _opinion(router, router_states, gold)
    routes = scores(router_states)[:, : len(experts)].argmax(dim=1).cpu()
    sum_logprobs = torch.zeros(len(gold))
    sum_right = torch.zeros(len(gold), dtype=torch.bool)
    logprobs, right = [], []
    for index, (expert, states) in enumerate(zip(experts, expert_states, strict=True)):
        opinion = _opinion(expert, states, gold)
        logprobs.append(opinion.logprobs)
        right.append(opinion.right)
        routed = routes == index
        fused = _judged(opinion.rows[routed] + own.rows[routed].to(opinion.rows.device), gold[routed])
        sum_logprobs[routed], sum_right[routed] = fused.logprobs, fused.right
    return _Verdicts(
        routes,
        torch.stack(logprobs, 1),
        torch.stack(right, 1),
        own.logprobs,
        own.right,
        sum_logprobs,
        sum_right,
    )


def _opinion(model: FrozenModel, states: Tensor, gold: Tensor) -> _Opinion:
    return _judged(
        model.head.rows(states.to(model.head.weight.device, model.head.weight.dtype)).float(), gold
    )


def _judged(rows: Tensor, gold: Tensor) -> _Opinion:
    there = gold.to(rows.device)
    logprobs = rows.gather(1, there[:, None])[:, 0] - torch.logsumexp(rows, dim=1)
    return _Opinion(rows, logprobs.cpu(), (rows.argmax(dim=1) == there).cpu())
