"""A later expert: one new row of the routing head (and of the gate), everything else frozen.

The new row learns from the targets where the n + 1 experts disagree, on hidden states that stand still. Rows of
the old domains, where given, are replayed beside the new ones, and the report says what becomes of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from fusionroute.router_model import Heads
from trainer.frozen_models import FrozenModel
from trainer.gate_head import zero_head
from trainer.gates import fit
from trainer.gates_table import GatesTable
from trainer.losses import expert_loss, gate_loss, informative_tokens
from trainer.rows import Labels, RowSet
from trainer.run_context import RunContext
from trainer.target_states import TargetSample, gold_logprobs_at_targets, states_at_targets


@dataclass(frozen=True, slots=True)
class Domain:
    """Targets of one data set, with everything that the new rows learn from.

    Attributes:
        hidden: ``[T, H]`` the router's states.
        router_gold: ``[T]`` log-probability of the target under the router alone.
        sample: targets and the n + 1 experts' opinions.
    """

    hidden: Tensor
    router_gold: Tensor
    sample: TargetSample

    @classmethod
    def of(
        cls,
        router: FrozenModel,
        rows: RowSet,
        labels: Labels,
        max_targets: int,
        seed: int,
        context: RunContext,
        stage: str,
    ) -> Domain:
        """Draws targets and computes the router's states at them."""
        sample = TargetSample.draw(rows, labels, max_targets, seed)
        hidden = states_at_targets(router, sample.rows, context, stage=stage)
        router_gold = gold_logprobs_at_targets(router, hidden, sample.gold)
        return cls(hidden, router_gold, sample)

    @property
    def informative(self) -> Tensor:
        """``[T]`` the set S of all n + 1 experts."""
        return informative_tokens(self.sample.argmax_ids, torch.ones(len(self.sample), dtype=torch.bool))


def extend_heads(
    heads: Heads, new: Domain, old: Domain | None, table: GatesTable, seed: int, context: RunContext
) -> tuple[Heads, dict[str, Any]]:
    """Heads for n + 1 experts, the new one last, and what it does to new and old targets.

    A gate gets its new row between the experts' and the router's; a sum gate stays as it is.

    Raises:
        TrainingFailed: LOSS_NOT_FINITE.
        Stopped: asked to.
    """
    domains = [new] if old is None else [new, old]
    hidden = torch.cat([domain.hidden for domain in domains])
    gold_logprobs = torch.cat([domain.sample.gold_logprobs for domain in domains])
    router_gold = torch.cat([domain.router_gold for domain in domains])
    informative = torch.cat([domain.informative for domain in domains])
    shares = _even_shares([int(domain.informative.sum()) for domain in domains], [len(d.sample) for d in domains])
    learnt = torch.nonzero(informative)[:, 0]
    old_routing = nn.functional.linear(hidden, heads.routing_weight.float(), heads.routing_bias.float())
    of_gate = heads.gate_inputs(hidden)
    old_gate = _gate_scores(heads, of_gate)
    routing_row = _competing_row(hidden, old_routing[learnt])
    gate_row = None if old_gate is None else _competing_row(of_gate, old_gate[learnt])

    def losses_at(flat: Tensor) -> dict[str, Tensor]:
        at = learnt[flat]
        # weights that give each domain the same say, however many of its targets are informative
        weights = shares[at] / shares[at].mean()
        states, all_count = hidden[at], torch.ones(len(at), dtype=torch.bool)
        scores = torch.cat([old_routing[at], routing_row(states)], dim=1)
        parts = {"expert_loss": _weighted(scores, gold_logprobs[at], weights)}
        if gate_row is not None and old_gate is not None:
            u = torch.cat([old_gate[at, :-1], gate_row(of_gate[at]), old_gate[at, -1:]], dim=1)
            parts["gate_loss"] = gate_loss(u, gold_logprobs[at], router_gold[at], all_count)
        return parts

    parameters = [*routing_row.parameters(), *(gate_row.parameters() if gate_row is not None else ())]
    losses: Mapping[str, float] = {}
    if len(learnt) > 0:
        losses = fit(parameters, losses_at, len(learnt), table, seed, context, stage="extend")
    extended = _with_rows(heads, routing_row, gate_row)
    named = {"new": new} if old is None else {"new": new, "old": old}
    return extended, {
        **losses,
        "informative_targets": len(learnt),
        **{
            f"{name}/{fact}": value
            for name, domain in named.items()
            for fact, value in _effect(heads, extended, domain).items()
        },
    }


def effect_note(facts: Mapping[str, Any], slot: str) -> str:
    """What `extend_heads` reports, in words."""
    lines = [f"expert {slot!r} was added by its own rows; everything else is as it was"]
    for name in ("new", "old"):
        if f"{name}/targets" in facts:
            before, after = facts[f"{name}/expert_right_before"], facts[f"{name}/expert_right_after"]
            lines.append(
                f"  {name} domain: routed expert right {before:.3f} -> {after:.3f}, "
                f"{facts[f'{name}/routed_to_new']:.1%} of {facts[f'{name}/targets']:,.0f} targets routed to it"
            )
    if "old/targets" not in facts:
        lines.append("  WARNING: what becomes of the old domains is not known; give old_data")
    return "\n".join(lines)


def _competing_row(hidden: Tensor, old_scores: Tensor) -> nn.Linear:
    """A row that begins with half of the weight: far below the trained rows its gradient would vanish."""
    row = zero_head(hidden.shape[1], 1)
    if len(old_scores) > 0:
        nn.init.constant_(row.bias, float(old_scores.logsumexp(dim=1).mean()))
    return row


def _even_shares(num_informative: list[int], num_targets: list[int]) -> Tensor:
    return torch.cat(
        [
            torch.full((targets,), 1.0 / max(1, informative))
            for informative, targets in zip(num_informative, num_targets, strict=True)
        ]
    )


def _weighted(scores: Tensor, gold_logprobs: Tensor, weights: Tensor) -> Tensor:
    """-log sum_i w_i pi_i with a weight for each target; all of them informative.

    Not the linear form of L_expert: its gradient dies where the new row has little weight, which alone can move.
    """
    return -(weights * torch.logsumexp(torch.log_softmax(scores, dim=1) + gold_logprobs, dim=1)).mean()


def _gate_scores(heads: Heads, inputs: Tensor) -> Tensor | None:
    if heads.gate_weight is None or heads.gate_bias is None:
        return None
    return nn.functional.linear(inputs, heads.gate_weight.float(), heads.gate_bias.float())


def _with_rows(heads: Heads, routing_row: nn.Linear, gate_row: nn.Linear | None) -> Heads:
    extended = replace(
        heads,
        routing_weight=torch.cat([heads.routing_weight.float(), routing_row.weight.detach()]),
        routing_bias=torch.cat([heads.routing_bias.float(), routing_row.bias.detach()]),
    )
    if gate_row is None or heads.gate_weight is None or heads.gate_bias is None:
        return extended
    weight, bias = heads.gate_weight.float(), heads.gate_bias.float()
    return replace(
        extended,
        gate_weight=torch.cat([weight[:-1], gate_row.weight.detach(), weight[-1:]]),
        gate_bias=torch.cat([bias[:-1], gate_row.bias.detach(), bias[-1:]]),
    )


def _effect(before: Heads, after: Heads, domain: Domain) -> dict[str, float]:
    """What the new expert changes on targets of a domain, before and after."""
    sample, informative = domain.sample, domain.informative
    old_scores, new_scores = (
        nn.functional.linear(domain.hidden, heads.routing_weight.float(), heads.routing_bias.float())
        for heads in (before, after)
    )
    num_old = old_scores.shape[1]
    old_routes, new_routes = old_scores.argmax(dim=1), new_scores.argmax(dim=1)
    right = sample.argmax_ids == sample.gold[:, None]
    at = torch.arange(len(sample))
    old_opinions = sample.gold_logprobs[:, :num_old]
    return {
        "targets": float(len(sample)),
        "routed_to_new": float((new_routes == num_old).float().mean()),
        "expert_right_before": float(right[at, old_routes].float().mean()),
        "expert_right_after": float(right[at, new_routes].float().mean()),
        "expert_loss_before": float(expert_loss(old_scores, old_opinions, informative)),
        "expert_loss_after": float(expert_loss(new_scores, sample.gold_logprobs, informative)),
    }
