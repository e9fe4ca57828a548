"""Who can be asked for rows, and how patiently."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from fusionroute.fusion import HeadLayout
from router_service.asking import Model, Patience
from router_service.draft_experience import Experience


@dataclass(frozen=True, slots=True)
class Ensemble:
    """Who can be asked: the router and the experts in the checkpoint's order.

    Attributes:
        end_ids: ids that end an answer.
        max_context_tokens: longest session.
        router_patience: for a row of the router.
        expert_patience: for a row of an expert.
        degrade_after_seconds: how long an expert may be missed before another way is gone, where the turn allows it.
        experience: what its turns have learnt about drafting.
        early: whether experts are asked before the router has routed; None = where it pays.
        top_logits: so many of its highest logits an expert of another host sends first; 0 = whole rows.
        base: the base model of `proxy`.
    """

    router: Model
    experts: Sequence[Model]
    layout: HeadLayout
    end_ids: frozenset[int]
    max_context_tokens: int
    router_patience: Patience
    expert_patience: Patience
    degrade_after_seconds: float
    experience: Experience = field(default_factory=Experience)
    early: bool | None = None
    top_logits: int = 0
    base: Model | None = None

    @property
    def models(self) -> Sequence[Model]:
        """Whom decisions name by index: the experts, and behind them the base model where there is one."""
        return self.experts if self.base is None else (*self.experts, self.base)
