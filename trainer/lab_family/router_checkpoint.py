"""Writing the family's router as a router checkpoint folder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from fusionroute.lab.tokenizer import build_tokenizer
from trainer.lab_family.recipe import Recipe

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM


def save_router(
    folder: Path,
    model: LlamaForCausalLM,
    routing: nn.Linear,
    gate: nn.Linear,
    sum_gate: nn.Linear,
    *,
    recipe: Recipe,
    seed: int,
    metrics: dict[str, Any],
) -> None:
    from safetensors.torch import save_file
    model.eval().save_pretrained(folder / "router")
    build_tokenizer().save_pretrained(folder / "router")
    heads = {}
    for n, h in (("routing", routing), ("gate", gate), ("sum_gate", sum_gate)):
        heads[n + ".weight"] = h.weight.detach().clone(); heads[n + ".bias"] = h.bias.detach().clone()
    save_file(heads, folder / "router" / "routing_head.safetensors")
