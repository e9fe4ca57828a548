"""How much is trained and asked."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

EXPERTS = ("math", "code", "prose")
GAP = "latex"
"""In the router's data, in no expert's."""
UNSEEN = "tasks"
"""In nobody's data."""
MIXED = "mixed"
"""Texts that change from one expert's domain to another's midway."""
ROUTER_DOMAINS = (*EXPERTS, GAP)
ASKED = (*EXPERTS, MIXED, GAP, UNSEEN)


@dataclass(frozen=True, slots=True)
class Sizes:
    """What decides the outcome, beside the seed.

    Attributes:
        max_tokens: of a row; longer ones are cut.
        max_prompt_tokens: rows with longer prompts are left out.
        expert_steps: of 8 chunks of 192 tokens each.
        router_rows: of each of the router's domains; phase I sees each `router_epochs` times.
        pair_prompts: of each of the router's domains.
        pair_tokens: of the right and of the written answers of pairs.
        pair_epochs: of phase II.
        documents: held-out ones of each domain.
    """

    name: str
    max_tokens: int = 256
    max_prompt_tokens: int = 120
    expert_steps: int = 160
    expert_learning_rate: float = 3e-3
    router_rows: int = 240
    router_epochs: float = 1.0
    router_learning_rate: float = 2e-3
    gate_steps: int = 300
    pair_prompts: int = 24
    pair_tokens: int = 48
    pair_epochs: float = 2.0
    pair_learning_rate: float = 3e-4
    documents: int = 40
    batch_rows: int = 8
    chunk_tokens: int = 192

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


FULL = Sizes("full")
QUICK = Sizes(
    "quick",
    max_tokens=48,
    max_prompt_tokens=30,
    expert_steps=4,
    router_rows=6,
    gate_steps=4,
    pair_prompts=2,
    pair_tokens=4,
    pair_epochs=1.0,
    documents=3,
    batch_rows=2,
    chunk_tokens=24,
)
