"""Writing the family's router as a router checkpoint: manifest and heads beside the causal LM."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from fusionroute import __version__
from fusionroute.engine.model import weights_fingerprint
from fusionroute.fusion import CombineRule
from fusionroute.lab.tokenizer import build_tokenizer
from fusionroute.router_model import ExpertRecord, Heads, Manifest, save_checkpoint
from fusionroute.vocabulary import logits_width, tokenizer_fingerprint
from trainer.lab_family.recipe import EXPERT_SLOTS, Recipe
from trainer.lab_family.training import load
from trainer.losses import LAMBDA

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

ROUTER_STARTS_FROM = "format"


def save_router(
    folder: Path,
    model: LlamaForCausalLM,
    heads: Heads,
    *,
    recipe: Recipe,
    seed: int,
    metrics: dict[str, Any],
) -> None:
    """Write ``<folder>/router`` for the experts that lie in ``<folder>/experts``."""
    tokenizer = build_tokenizer()
    fingerprint, width = tokenizer_fingerprint(tokenizer), logits_width(tokenizer)
    experts = tuple(
        ExpertRecord(
            slot=slot,
            name=f"lab-{slot}",
            tokenizer_fingerprint=fingerprint,
            logits_width=width,
            weights_fingerprint=weights_fingerprint(load(str(folder / "experts" / slot))),
        )
        for slot in EXPERT_SLOTS
    )
    start = experts[EXPERT_SLOTS.index(ROUTER_STARTS_FROM)]
    manifest = Manifest(
        experts=experts,
        combine=CombineRule.SUM.value,
        tokenizer_fingerprint=fingerprint,
        logits_width=width,
        lineage={"parent": start.name, "parent_weights_fingerprint": start.weights_fingerprint, "seed": seed},
        switches={"phase": "sft", "lambda": LAMBDA, "aggregate": "linear", "recipe": recipe.to_json()},
        metrics=metrics,
        code_version=__version__,
    )
    save_checkpoint(folder / "router", model.eval(), tokenizer, heads, manifest)


def heads_of(routing: nn.Linear, gate: nn.Linear, sum_gate: nn.Linear) -> Heads:
    """The trained linear layers as the heads of a checkpoint."""
    return Heads(
        routing_weight=routing.weight.detach(),
        routing_bias=routing.bias.detach(),
        gate_weight=gate.weight.detach(),
        gate_bias=gate.bias.detach(),
        sum_gate_weight=sum_gate.weight.detach(),
        sum_gate_bias=sum_gate.bias.detach(),
    )
