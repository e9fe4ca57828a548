"""The gates (method section 6): heads on hidden states that stand still, trained after phase I.

    mixture gate   G: hidden -> n + 1, the last row is the router itself; needs the cached labels alone
    sum gate       one row that scales the complement; needs the routed expert's logits, so its hidden states

Hidden states are kept, rows of logits never: each step computes those of its own batch. A mixture gate that reaches
the router has been trained with it by the loop, and stays as it is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fusionroute.errors import Reason, TrainingFailed
from fusionroute.router_model import Heads
from trainer.frozen_models import FrozenModel
from trainer.gate_head import GateHead, with_gate
from trainer.gates_table import GatesTable
from trainer.losses import gate_loss, sum_gate_loss
from trainer.rows import Labels, RowSet
from trainer.run_context import RunContext, RunProgress
from trainer.target_states import TargetSample, gold_logprobs_at_targets, states_at_targets
from trainer.vocabulary_head import VocabularyHead

BETAS = (0.9, 0.98)
FINAL_SHARE = 0.1
REPORT_EVERY_STEPS = 20

LoadExpert = Callable[[int], FrozenModel]
"""Loads the expert of an index; called once for each, one after the other."""


@dataclass(frozen=True, slots=True)
class RoutedStates:
    """Hidden states of the experts that the routing head chooses.

    Attributes:
        states: by expert ``[T_i, H_i]``, of the targets routed to it.
        places: ``[T]`` where a target's state stands among those of its expert.
        routes: ``[T]`` the expert of a target.
        heads: by expert, what makes logits of its states.
    """

    states: Sequence[Tensor]
    places: Tensor
    routes: Tensor
    heads: Sequence[VocabularyHead]

    def rows(self, flat: Tensor) -> Tensor:
        """Logits ``[B, V]`` of the routed experts at the targets `flat` ``[B]``."""
        routes = self.routes[flat]
        output: Tensor | None = None
        for expert in torch.unique(routes).tolist():
            at = torch.nonzero(routes == expert)[:, 0]
            head = self.heads[expert]
            states = self.states[expert][self.places[flat[at]]]
            found = head.rows(states.to(head.weight.device)).cpu()
            if output is None:
                output = found.new_empty(len(flat), found.shape[1])
            output[at] = found
        assert output is not None  # a batch has at least one target
        return output


def train_gates(
    router: FrozenModel,
    heads: Heads,
    rows: RowSet,
    labels: Labels,
    table: GatesTable,
    seed: int,
    context: RunContext,
    load_expert: LoadExpert | None = None,
) -> tuple[Heads, dict[str, float]]:
    """Fits new gates for a trained router.

    Args:
        router: the router, frozen.
        heads: its routing head; gates it may have are replaced, but for one that `table` says has learnt with it.
        rows, labels: what it was trained on.
        load_expert: for the sum gate; None leaves that one out.

    Returns:
        The heads with gates, and the losses of the last step.

    Raises:
        TrainingFailed: LOSS_NOT_FINITE.
        Stopped: asked to.
    """
    sample = TargetSample.draw(rows, labels, table.max_targets, seed)
    if len(sample) == 0:
        return with_gate(with_gate(heads, "gate", None), "sum_gate", None), {}
    hidden = states_at_targets(router, sample.rows, context, stage="gates: router")
    router_gold = gold_logprobs_at_targets(router, hidden, sample.gold)
    num_experts = sample.gold_logprobs.shape[1]
    gate = None if table.reaches_router else GateHead(hidden.shape[1], num_experts + 1, table, seed)
    sum_gate = routed = None
    if load_expert is not None:
        routes = nn.functional.linear(hidden, heads.routing_weight.float(), heads.routing_bias.float()).argmax(1)
        routed = _routed_states(routes, num_experts, sample, load_expert, context)
        sum_gate = GateHead(hidden.shape[1], 1, table, seed + 1)

    def losses_at(flat: Tensor) -> dict[str, Tensor]:
        states, all_count = hidden[flat], torch.ones(len(flat), dtype=torch.bool)
        parts: dict[str, Tensor] = {}
        if gate is not None:
            parts["gate_loss"] = gate_loss(
                gate(states), sample.gold_logprobs[flat], router_gold[flat], all_count
            )
        if sum_gate is not None and routed is not None:
            with torch.no_grad():
                expert_rows = routed.rows(flat)
                router_rows = router.head.rows(states.to(router.head.weight.device)).cpu()
            scores = sum_gate(states)[:, 0]
            parts["sum_gate_loss"] = sum_gate_loss(
                scores, expert_rows, router_rows, sample.gold[flat], all_count
            )
        return parts

    parameters = [parameter for head in (gate, sum_gate) if head is not None for parameter in head.parameters()]
    # the gates share no parameters, so one optimiser and one sum of losses trains each as if it were alone
    metrics = fit(parameters, losses_at, len(sample), table, seed, context, stage="gates") if parameters else {}
    if gate is not None:
        heads = with_gate(heads, "gate", dict(gate.named_parameters()))
    return with_gate(heads, "sum_gate", None if sum_gate is None else dict(sum_gate.named_parameters())), metrics


def _routed_states(
    routes: Tensor, num_experts: int, sample: TargetSample, load_expert: LoadExpert, context: RunContext
) -> RoutedStates:
    """One expert at a time, and of each only the targets that are routed to it."""
    states, heads = [], []
    places = torch.zeros(len(routes), dtype=torch.int64)
    for index in range(num_experts):
        mine = routes == index
        places[mine] = torch.arange(int(mine.sum()))
        expert = load_expert(index)
        stage = f"gates: {expert.record.slot}"
        states.append(states_at_targets(expert, sample.rows, context, stage=stage, kept=mine))
        heads.append(expert.head)
    return RoutedStates(states, places, routes, heads)


def fit(
    parameters: Sequence[nn.Parameter],
    losses_at: Callable[[Tensor], dict[str, Tensor]],
    num_targets: int,
    table: GatesTable,
    seed: int,
    context: RunContext,
    *,
    stage: str,
) -> dict[str, float]:
    """AdamW without decay: warm-up, then cosine to a tenth, on random batches of targets.

    Args:
        losses_at: ``[B]`` indices of targets to named losses, which are added.

    Returns:
        The named losses of the last step.
    """
    optimizer = torch.optim.AdamW(parameters, lr=table.learning_rate, betas=BETAS, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate_share(step, table))
    metrics: dict[str, float] = {}
    for step, flat in enumerate(_batches(num_targets, table, seed), start=1):
        context.stop.check()
        parts = losses_at(flat)
        loss = torch.stack(list(parts.values())).sum()
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
        if step % REPORT_EVERY_STEPS == 0 or step == table.num_steps:
            metrics = {name: value.item() for name, value in parts.items()}
            if not all(math.isfinite(value) for value in metrics.values()):
                raise TrainingFailed(Reason.LOSS_NOT_FINITE, f"{stage}: step {step} of {table.num_steps}: {metrics}")
            context.report(RunProgress(stage, step, table.num_steps, loss.item(), metrics))
    return metrics


def _rate_share(step: int, table: GatesTable) -> float:
    if step < table.warmup_steps:
        return (step + 1) / table.warmup_steps
    done = (step - table.warmup_steps) / max(1, table.num_steps - table.warmup_steps)
    return FINAL_SHARE + (1.0 - FINAL_SHARE) * 0.5 * (1.0 + math.cos(math.pi * min(done, 1.0)))


def _batches(num_targets: int, table: GatesTable, seed: int) -> Iterator[Tensor]:
    """Indices of targets, epoch after epoch in fresh orders; the last ones of an epoch may be left out."""
    generator = torch.Generator().manual_seed(seed)
    size = min(table.batch_targets, num_targets)
    taken = 0
    while True:
        order = torch.randperm(num_targets, generator=generator)
        for start in range(0, num_targets - size + 1, size):
            if taken == table.num_steps:
                return
            taken += 1
            yield order[start : start + size]


def gate_facts(table: GatesTable, heads: Heads) -> dict[str, Any]:
    """For the manifest: which gates there are and how they were trained."""
    return {
        "gate": heads.gate_weight is not None,
        "sum_gate": heads.sum_gate_weight is not None,
        **table.model_dump(exclude={"enabled", "sum_gate"}),
    }
