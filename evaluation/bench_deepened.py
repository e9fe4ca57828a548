"""A trained family whose experts are deeper by layers that change nothing: the same texts at a larger expert's price.

A layer whose attention and feed-forward outputs are zero passes its input on. So the router becomes a known share of an
expert's size while acceptance of drafts stays that of models which have really been trained together.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from evaluation.bench_reference import load_causal_lm
from evaluation.bench_shapes import RandomFamily
from fusionroute.engine.model import weights_fingerprint
from fusionroute.router_model import load_checkpoint, save_checkpoint
from fusionroute.vocabulary import load_tokenizer


def write_deepened(folder: Path, router: str, experts: Mapping[str, str], times: int) -> RandomFamily:
    """Writes the experts with `times` as many layers, and the router as it is, for them.

    Args:
        folder: an empty one.
        router: a checkpoint whose experts are Llamas.
        experts: their folders by slot.
    """
    tokenizer = load_tokenizer(router)
    deepened: dict[str, Path] = {}
    fingerprints: dict[str, str] = {}
    for slot, path in experts.items():
        model = deepen(load_causal_lm(path), times)
        deepened[slot] = folder / slot
        model.save_pretrained(deepened[slot])
        tokenizer.save_pretrained(deepened[slot])
        fingerprints[slot] = weights_fingerprint(model)
    checkpoint = load_checkpoint(router)
    records = tuple(
        replace(record, weights_fingerprint=fingerprints[record.slot])
        for record in checkpoint.manifest.experts
    )
    manifest = replace(checkpoint.manifest, experts=records)
    save_checkpoint(folder / "router", load_causal_lm(router), tokenizer, checkpoint.heads, manifest)
    return RandomFamily(folder / "router", deepened)


def deepen(model: Any, times: int) -> Any:
    """A Llama with `times` as many layers and the same logits."""
    from copy import deepcopy

    from transformers import LlamaForCausalLM

    config = deepcopy(model.config)
    num_layers = config.num_hidden_layers
    config.num_hidden_layers = num_layers * times
    config.layer_types = None
    deep = LlamaForCausalLM(config).to(model.dtype).eval()
    deep.load_state_dict(model.state_dict(), strict=False)
    with torch.no_grad():
        for layer in deep.model.layers[num_layers:]:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
    deep.tie_weights()
    return deep
