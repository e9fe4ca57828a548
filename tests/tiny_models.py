"""Small models with random weights, one for each supported family, and a tokenizer of numbered words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

WIDTH = 61
MAX_CONTEXT = 96

_SIZES: dict[str, Any] = {
    "vocab_size": WIDTH,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": MAX_CONTEXT,
    "bos_token_id": None,
    "eos_token_id": 1,
    "pad_token_id": 0,
}


def word_tokenizer(width: int = WIDTH) -> PreTrainedTokenizerFast:
    """Words "w2", "w3", ... besides pad (0) and end of sequence (1)."""
    words = {"<pad>": 0, "<eos>": 1} | {f"w{index}": index for index in range(2, width)}
    tokenizer = Tokenizer(WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")


def tiny_model(family: str, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A causal LM of about 30,000 random parameters with logits that differ visibly from token to token."""
    torch.manual_seed(seed)
    sizes = _SIZES | changes
    model: PreTrainedModel
    match family:
        case "llama":
            model = LlamaForCausalLM(LlamaConfig(**sizes))
        case "gemma2":
            gemma = {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 7}
            caps = {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 5.0}
            model = Gemma2ForCausalLM(Gemma2Config(**(sizes | gemma | caps)))
        case "qwen2":
            model = Qwen2ForCausalLM(
                Qwen2Config(**sizes, use_sliding_window=True, sliding_window=9, max_window_layers=1)
            )
        case "qwen3":
            model = Qwen3ForCausalLM(Qwen3Config(**sizes, head_dim=16))
        case _:
            raise ValueError(family)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4.0)
    return model.eval()


PIECES = (*'{}[]":,.-_ 0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHé\n', '":', "10")


def character_tokenizer() -> PreTrainedTokenizerFast:
    """A token for each of some characters, and two longer ones that only a model would write."""
    words = {"<pad>": 0, "<eos>": 1} | {each: index for index, each in enumerate(PIECES, 2)}
    assert len(words) == WIDTH
    tokenizer = Tokenizer(WordLevel(words, unk_token="_"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        clean_up_tokenization_spaces=False,
    )


def save_tiny_model(
    folder: Path,
    family: str = "llama",
    seed: int = 0,
    tokenizer: PreTrainedTokenizerFast | None = None,
    **changes: Any,
) -> Path:
    """Writes a tiny model and its tokenizer, by default of words, where `load_model` finds them."""
    tiny_model(family, seed, **changes).save_pretrained(folder)
    tokenizer = tokenizer or word_tokenizer(changes.get("vocab_size", WIDTH))
    tokenizer.save_pretrained(folder)
    return folder


@torch.no_grad()
def eager_rows(model: PreTrainedModel, token_ids: list[int]) -> torch.Tensor:
    """All logits rows [tokens, vocabulary] of one sequence, by the model's own eager attention and no cache."""
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    rows: torch.Tensor = model(input_ids=torch.tensor([token_ids]), use_cache=False).logits[0]
    model.set_attn_implementation(before)
    return rows
