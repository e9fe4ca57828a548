"""How the family is made: sizes of the models, steps, batches and learning rates of every stage."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

EXPERT_SLOTS = ("math", "strings", "format")
STAGES = ("base", *EXPERT_SLOTS, "router", "gates", "preferences")


_STAGE_FIELDS = ("base", "expert", "router", "gates", "preferences")


@dataclass(frozen=True, slots=True)
class Stage:
    """One run of AdamW: linear warm-up, then cosine down to a tenth of the learning rate."""

    num_steps: int
    batch_size: int
    learning_rate: float
    warmup_steps: int = 20


@dataclass(frozen=True, slots=True)
class Recipe:
    """Everything that decides the weights, except the seed and the code.

    Attributes:
        hidden_size, num_layers, num_heads, intermediate_size: shape of every model (Llama, tied embeddings).
        base, expert: stages on streams of fresh items.
        num_router_items: gold answers over all tasks that the router sees, again and again, in stage
            `router`.
        router: the SFT stage; its steps are whole epochs over these items.
        gates: the stage of the gates; as many steps as phase I, on about as many tokens as its batches of
            rows hold.
        num_pair_prompts: fresh prompts over all tasks, to which the fused policy of phase I gives the rejected
            answers where it is wrong.
        preferences: the CDPO stage; its batches hold so many pairs and as many gold answers, its steps are
            `preference_epochs` over the pairs, `num_steps` only says about how many that is.
    """

    hidden_size: int
    num_layers: int
    num_heads: int
    intermediate_size: int
    base: Stage
    expert: Stage
    num_router_items: int
    router: Stage
    gates: Stage
    num_pair_prompts: int
    preferences: Stage
    preference_epochs: int

    def stage(self, name: str) -> Stage:
        """The stage of this name; the three experts share one."""
        stages = {
            "base": self.base,
            "router": self.router,
            "gates": self.gates,
            "preferences": self.preferences,
        }
        return stages.get(name, self.expert)

    def to_json(self) -> dict[str, Any]:
        """The recipe as plain values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Recipe:
        """The recipe that `to_json` wrote."""
        stages = {name: Stage(**values[name]) for name in _STAGE_FIELDS}
        return cls(**{**values, **stages})


RECIPES: dict[str, Recipe] = {
    "demo": Recipe(
        hidden_size=64,
        num_layers=2,
        num_heads=4,
        intermediate_size=168,
        base=Stage(600, 64, 4e-3),
        expert=Stage(450, 64, 2e-3),
        num_router_items=3000,
        router=Stage(372, 32, 1e-3),
        gates=Stage(372, 288, 1e-2),
        num_pair_prompts=2500,
        preferences=Stage(80, 32, 5e-4, warmup_steps=10),
        preference_epochs=4,
    ),
    "full": Recipe(
        hidden_size=96,
        num_layers=3,
        num_heads=4,
        intermediate_size=256,
        base=Stage(700, 64, 3e-3),
        expert=Stage(400, 64, 1e-3),
        num_router_items=4000,
        router=Stage(500, 32, 1e-3),
        gates=Stage(500, 288, 1e-2),
        num_pair_prompts=3000,
        preferences=Stage(80, 32, 3e-4, warmup_steps=10),
        preference_epochs=4,
    ),
}
