"""Families of a given size with random weights: speed does not ask what a model has learnt."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fusionroute.engine import load_model
from fusionroute.router_model import ExpertRecord, Heads, Manifest, save_checkpoint

NUM_EXPERTS = 3


@dataclass(frozen=True, slots=True)
class Shape:
    """A Llama's sizes."""

    hidden: int
    layers: int
    heads: int
    key_value_heads: int
    intermediate: int
    vocabulary: int


SHAPES = {
    "h512": Shape(512, 8, 8, 4, 1408, 128_256),
    "h128": Shape(128, 4, 4, 2, 352, 4_096),
}


@dataclass(frozen=True, slots=True)
class RandomFamily:
    """Where the models of a family lie."""

    router: Path
    experts: dict[str, Path]


def write_family(folder: Path, shape: Shape, dtype: str, seed: int = 0) -> RandomFamily:
    """Writes three experts and a router checkpoint whose head changes experts often.

    Args:
        folder: an empty one; takes four times the size of a model.
        dtype: number format of the weights, "float32", "bfloat16" or "float16".
    """
    tokenizer = _tokenizer(shape.vocabulary)
    experts: dict[str, Path] = {}
    records: list[ExpertRecord] = []
    for number in range(NUM_EXPERTS):
        slot = f"expert{number}"
        experts[slot] = folder / slot
        _model(shape, dtype, seed + number).save_pretrained(experts[slot])
        tokenizer.save_pretrained(experts[slot])
        facts = load_model(str(experts[slot])).facts
        fingerprints = (facts.tokenizer_fingerprint, facts.logits_width, facts.weights_fingerprint)
        records.append(ExpertRecord(slot, slot, *fingerprints))
    manifest = Manifest(
        experts=tuple(records),
        combine="sum",
        tokenizer_fingerprint=records[0].tokenizer_fingerprint,
        logits_width=records[0].logits_width,
        lineage={"weights": "random"},
    )
    torch.manual_seed(seed)
    heads = Heads(torch.randn(NUM_EXPERTS, shape.hidden), torch.zeros(NUM_EXPERTS))
    save_checkpoint(folder / "router", _model(shape, dtype, seed + 99), tokenizer, heads, manifest)
    return RandomFamily(folder / "router", experts)


def prompt(shape: Shape, num_tokens: int = 64) -> list[int]:
    """Some ids."""
    return [(7919 * step + 11) % shape.vocabulary for step in range(num_tokens)]


def _model(shape: Shape, dtype: str, seed: int) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.key_value_heads,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config).to(getattr(torch, dtype))


def _tokenizer(vocabulary: int) -> Any:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    words = {f"w{index}": index for index in range(vocabulary)}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, unk_token="w0")), pad_token="w0", eos_token="w1"
    )
