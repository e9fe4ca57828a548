"""What a turn has cost so far."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from router_service.drafting import Drafter


@dataclass(slots=True)
class DraftCounts:
    """What became of one drafter's drafts."""

    num_rounds: int = 0
    num_drafted_tokens: int = 0
    num_accepted_tokens: int = 0


@dataclass(slots=True)
class Costs:
    """What a turn has cost so far; seconds on the clock of time.monotonic().

    Attributes:
        expert_seconds: waiting for experts while nothing else could be done; an expert that computed beside the router
            counts with what was still to be waited for.
        drafts: by who made them.
        num_early_asks: tokens for which an expert was asked before the router had routed.
        num_early_hits: of these, tokens for which it was the right one.
    """

    started: float = field(default_factory=time.monotonic)
    first_token_seconds: float = 0.0
    num_router_forwards: int = 0
    num_expert_calls: int = 0
    router_seconds: float = 0.0
    router_forward_seconds: float = 0.0
    expert_seconds: float = 0.0
    expert_forward_seconds: float = 0.0
    fuse_seconds: float = 0.0
    num_replays: int = 0
    num_retries: int = 0
    num_degraded_tokens: int = 0
    store_seconds: float = 0.0
    total_seconds: float = 0.0
    drafts: dict[Drafter, DraftCounts] = field(default_factory=dict)
    num_early_asks: int = 0
    num_early_hits: int = 0

    def note_draft(self, drafter: Drafter, num_drafted: int, num_accepted: int) -> None:
        """A draft was checked."""
        counts = self.drafts.setdefault(drafter, DraftCounts())
        counts.num_rounds += 1
        counts.num_drafted_tokens += num_drafted
        counts.num_accepted_tokens += num_accepted
