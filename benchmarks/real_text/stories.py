"""The base: a small Llama that was really trained on stories, and its tokenizer, from files of llama2.c."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

FOLDER = "tinylm_stories260k"
NUM_SPECIAL, NUM_BYTES = 3, 256
WORD_START = "\u2581"


def save_base(data: Path, folder: Path) -> None:
    """Writes model and tokenizer as Hugging Face does. Raises OSError: the files are not there."""
    source = data / FOLDER
    read_model(source / "stories260K.bin").save_pretrained(folder)
    read_tokenizer(source / "tok512.bin").save_pretrained(folder)


def read_model(path: Path) -> LlamaForCausalLM:
    """The model of a llama2.c v0 file: seven int32, then float32."""
    from transformers import LlamaConfig, LlamaForCausalLM

    raw = path.read_bytes()
    width, inner, layers, heads, kv_heads, vocabulary, context = struct.unpack("<7i", raw[:28])
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=context,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=None,
    )
    numbers = _Numbers(torch.from_numpy(np.frombuffer(raw[28:], dtype="<f4").copy()))
    head, kv_width = width // heads, kv_heads * (width // heads)
    embedding = numbers.take(vocabulary, width)
    stacked = {
        "input_layernorm": numbers.take(layers, width),
        "self_attn.q_proj": numbers.take(layers, width, width),
        "self_attn.k_proj": numbers.take(layers, kv_width, width),
        "self_attn.v_proj": numbers.take(layers, kv_width, width),
        "self_attn.o_proj": numbers.take(layers, width, width),
        "post_attention_layernorm": numbers.take(layers, width),
        "mlp.gate_proj": numbers.take(layers, inner, width),
        "mlp.down_proj": numbers.take(layers, width, inner),
        "mlp.up_proj": numbers.take(layers, inner, width),
    }
    for name in ("self_attn.q_proj", "self_attn.k_proj"):
        stacked[name] = torch.stack([_half_split(each, head) for each in stacked[name]])
    weights = {
        f"model.layers.{layer}.{name}.weight": rows[layer]
        for name, rows in stacked.items()
        for layer in range(layers)
    }
    ends = {"model.embed_tokens.weight": embedding, "model.norm.weight": numbers.take(width)}
    model = LlamaForCausalLM(config)
    model.load_state_dict({**weights, **ends, "lm_head.weight": embedding})
    return model.eval()


def read_tokenizer(path: Path) -> PreTrainedTokenizerFast:
    """The tokenizer of a llama2.c file as a byte-pair one with bytes to fall back to; merges go by score."""
    from tokenizers import Tokenizer, decoders, models, normalizers, processors
    from transformers import PreTrainedTokenizerFast

    scores, words = _pieces(path.read_bytes())
    ids = {word: number for number, word in enumerate(words)}
    merges = [
        (-scores[number], word[:cut], word[cut:])
        for number, word in enumerate(words)
        if number >= NUM_SPECIAL + NUM_BYTES
        for cut in range(1, len(word))
        if word[:cut] in ids and word[cut:] in ids
    ]
    pairs = [(left, right) for _, left, right in sorted(merges, key=lambda each: each[0])]
    tokenizer = Tokenizer(models.BPE(ids, pairs, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend(WORD_START), normalizers.Replace(" ", WORD_START)]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace(WORD_START, " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", ids["<s>"])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
    )


class _Numbers:
    """Tensors one after the other."""

    def __init__(self, numbers: Tensor) -> None:
        self._numbers, self._place = numbers, 0

    def take(self, *shape: int) -> Tensor:
        """The next one."""
        first, self._place = self._place, self._place + int(np.prod(shape))
        return self._numbers[first : self._place].reshape(shape).clone()


def _half_split(rows: Tensor, head: int) -> Tensor:
    """Rows for rotations of halves instead of neighbours, ``[heads * head, H]``."""
    return rows.reshape(-1, head // 2, 2, rows.shape[1]).transpose(1, 2).reshape(rows.shape)


def _pieces(raw: bytes) -> tuple[list[float], list[str]]:
    """Scores and names by id."""
    scores: list[float] = []
    words: list[str] = []
    place = 4
    while place < len(raw):
        score, length = struct.unpack("<fi", raw[place : place + 8])
        word = raw[place + 8 : place + 8 + length].decode()
        scores.append(score)
        words.append(word.replace(" ", WORD_START))
        place += 8 + length
    words[:NUM_SPECIAL] = ["<unk>", "<s>", "</s>"]
    words[NUM_SPECIAL : NUM_SPECIAL + NUM_BYTES] = [f"<0x{byte:02X}>" for byte in range(NUM_BYTES)]
    return scores, words
