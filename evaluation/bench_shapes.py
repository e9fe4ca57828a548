"""Families of a given size with random weights: what a forward costs does not ask what a model has learnt.

The matrices of the layers are larger than at the start of a training, so that the hidden state forgets the token it
came from: greedy texts then change tokens and experts as trained models do, and are no loop of one token.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fusionroute.engine.model import weights_fingerprint
from fusionroute.router_model import ExpertRecord, Heads, Manifest, save_checkpoint
from fusionroute.vocabulary import logits_width, tokenizer_fingerprint

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NUM_EXPERTS = 3
MAX_CONTEXT_TOKENS = 4096
CALIBRATION_TOKENS = 256
USUAL_DEVIATION = 0.02
LAYER_GAIN = 8.0
"""By how much the layers' matrices exceed it."""


@dataclass(frozen=True, slots=True)
class Shape:
    """A Llama's sizes."""

    hidden: int
    layers: int
    heads: int
    key_value_heads: int
    intermediate: int
    vocabulary: int

    def kv_bytes_per_token(self, dtype: str) -> int:
        """Keys and values of one token in all layers."""
        head_size = self.hidden // self.heads
        itemsize = torch.empty(0, dtype=getattr(torch, dtype)).element_size()
        return 2 * self.layers * self.key_value_heads * head_size * itemsize


SHAPES: Mapping[str, Shape] = {
    "h512": Shape(512, 8, 8, 4, 1408, 128_256),
    "h256": Shape(256, 6, 8, 4, 704, 32_000),
    "h128": Shape(128, 4, 4, 2, 352, 4_096),
    "h32": Shape(32, 2, 4, 2, 48, 300),
    # a full row behind almost no forward, for what the way between two processes costs
    "row128k": Shape(16, 1, 2, 1, 32, 128_256),
}


@dataclass(frozen=True, slots=True)
class RandomFamily:
    """Where the models of a family lie."""

    router: Path
    experts: dict[str, Path]


def write_family(
    folder: Path,
    shape: Shape,
    dtype: str,
    seed: int = 0,
    *,
    num_experts: int = NUM_EXPERTS,
    router_shape: Shape | None = None,
    with_gates: bool = False,
) -> RandomFamily:
    """Writes experts and a router checkpoint whose head changes experts often.

    Args:
        folder: an empty one; takes one model more than there are experts.
        dtype: number format of the weights, "float32", "bfloat16" or "float16".
        router_shape: of the router, where it differs.
        with_gates: whether the router has the gates of `mixture`, `select` and `gated_sum`.
    """
    router_shape = router_shape or shape
    words = _Words(folder, shape.vocabulary)
    experts: dict[str, Path] = {}
    records: list[ExpertRecord] = []
    for number in range(num_experts):
        slot = f"expert{number}"
        experts[slot] = folder / slot
        model = _model(shape, dtype, seed + number)
        model.save_pretrained(experts[slot])
        words.link_into(experts[slot])
        records.append(ExpertRecord(slot, slot, words.fingerprint, words.width, weights_fingerprint(model)))
    manifest = Manifest(
        experts=tuple(records),
        combine="sum",
        tokenizer_fingerprint=words.fingerprint,
        logits_width=words.width,
        lineage={"weights": "random"},
    )
    router = _model(router_shape, dtype, seed + 99)
    heads = _heads(num_experts, router, seed, with_gates=with_gates)
    save_checkpoint(folder / "router", router, words.tokenizer, heads, manifest)
    return RandomFamily(folder / "router", experts)


def prompt(shape: Shape, num_tokens: int = 64, number: int = 0) -> list[int]:
    """Some ids; prompts of different numbers share no beginning."""
    return [(7919 * step + 104_729 * number + 11) % shape.vocabulary for step in range(num_tokens)]


class _Words:
    """A tokenizer of numbered words, which takes a second to make and is made once for all models of a family."""

    def __init__(self, folder: Path, vocabulary: int) -> None:
        self.tokenizer = _tokenizer(vocabulary)
        self.fingerprint = tokenizer_fingerprint(self.tokenizer)
        self.width = logits_width(self.tokenizer)
        self._folder = folder / "tokenizer"
        self.tokenizer.save_pretrained(self._folder)

    def link_into(self, folder: Path) -> None:
        for file in self._folder.iterdir():
            os.link(file, folder / file.name)


def _heads(num_experts: int, router: Any, seed: int, *, with_gates: bool) -> Heads:
    """Heads whose scores are zero on average, so that no expert is always the best."""
    hidden = router.config.hidden_size
    torch.manual_seed(seed)
    text = torch.randint(router.config.vocab_size, (1, CALIBRATION_TOKENS))
    with torch.inference_mode():
        mean = router.model(text, use_cache=False).last_hidden_state[0].float().mean(0)

    def centred(num_scores: int) -> tuple[Tensor, Tensor]:
        weight = torch.randn(num_scores, hidden)
        return weight, -(weight @ mean)

    if not with_gates:
        return Heads(*centred(num_experts))
    return Heads(*centred(num_experts), *centred(num_experts + 1), torch.zeros(1, hidden), torch.zeros(1))


def _model(shape: Shape, dtype: str, seed: int) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.initialization import no_init_weights
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.key_value_heads,
        max_position_embeddings=MAX_CONTEXT_TOKENS,
        tie_word_embeddings=True,
    )
    with no_init_weights():  # it would draw everything twice
        model = LlamaForCausalLM(config).to(getattr(torch, dtype))
    model.eval().tie_weights()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.fill_(1.0)
            else:
                parameter.normal_(0.0, USUAL_DEVIATION * (LAYER_GAIN if ".layers." in name else 1.0))
    return model


def _tokenizer(vocabulary: int) -> PreTrainedTokenizerBase:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    words = {f"w{index}": index for index in range(vocabulary)}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, unk_token="w0")), pad_token="w0", eos_token="w1"
    )
