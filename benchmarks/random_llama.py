"""A Llama of the wanted size with random weights: what an engine is measured with."""

from __future__ import annotations

import torch
from transformers import LlamaConfig, LlamaForCausalLM

WIDTH = 61


def random_llama(
    *, hidden: int, layers: int, intermediate: int, max_tokens: int, dtype: str = "float32"
) -> LlamaForCausalLM:
    """The same weights every time, over `WIDTH` ids.

    Args:
        intermediate: width of the feed-forward layers.
        max_tokens: longest session.
        dtype: number format of the weights.
    """
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=WIDTH,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=max_tokens,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config).to(getattr(torch, dtype)).eval()
