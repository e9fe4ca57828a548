"""What others do within one process: `generate` with and without help, and sums of several models' logits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Prompts = Sequence[Sequence[int]]


def load_for_generate(folder: str) -> Any:
    """A transformers causal LM that writes on after the end of sequence, as the other ways do."""
    from evaluation.bench_reference import load_causal_lm

    model = load_causal_lm(folder)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


def generate(model: Any, prompts: Prompts, num_tokens: int, **help_options: Any) -> list[list[int]]:
    """Hugging Face's `generate`, greedy, `num_tokens` new ids for each prompt, in one padded batch.

    Args:
        help_options: of assisted generation, which takes one prompt at a time.
    """
    ids, mask = left_padded(prompts)
    with torch.inference_mode():
        output = model.generate(
            ids, attention_mask=mask, do_sample=False, max_new_tokens=num_tokens, **help_options
        )
    return [[int(token) for token in row[ids.shape[1] :]] for row in output]


@dataclass(frozen=True, slots=True)
class LogitSum:
    """Greedy decoding of a weighted sum of models' logits, every model with its own cache, prompts in one batch.

    Weights (1, 1) are the product of two models; (1, 1, -1) is proxy tuning: base + expert - anti-expert.
    """

    models: Sequence[Any]
    weights: Sequence[float]

    def generate(self, prompts: Prompts, num_tokens: int) -> list[list[int]]:
        """`num_tokens` new ids for each prompt, end of sequence or not."""
        from transformers import DynamicCache

        caches = [DynamicCache(config=model.config) for model in self.models]
        fed, mask = left_padded(prompts)
        # without padding there is nothing to mask, and a plain causal forward is faster
        is_ragged = bool((mask == 0).any())
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        written: list[Tensor] = []
        with torch.inference_mode():
            for _ in range(num_tokens):
                place = {"attention_mask": mask, "position_ids": positions} if is_ragged else {}
                fed = self._scores(fed, place, caches).argmax(dim=1, keepdim=True)
                written.append(fed)
                positions = positions[:, -1:] + 1
                mask = torch.cat((mask, mask.new_ones(len(prompts), 1)), dim=1)
        rows: list[list[int]] = torch.cat(written, dim=1).tolist()
        return rows

    def _scores(self, fed: Tensor, place: dict[str, Tensor], caches: Sequence[Any]) -> Tensor:
        """The weighted sum of float32 logits [prompts, V] at each prompt's last position."""
        parts = [
            model(fed, past_key_values=cache, use_cache=True, logits_to_keep=1, **place).logits[:, -1].float()
            for model, cache in zip(self.models, caches, strict=True)
        ]
        total: Tensor = parts[0] * self.weights[0]
        for part, weight in zip(parts[1:], self.weights[1:], strict=True):
            total.add_(part, alpha=weight)
        return total


def left_padded(prompts: Prompts) -> tuple[Tensor, Tensor]:
    """Ids and attention mask [prompts, longest], padded in front with zeros."""
    longest = max(len(prompt) for prompt in prompts)
    ids = [[0] * (longest - len(prompt)) + list(prompt) for prompt in prompts]
    mask = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    return torch.tensor(ids), torch.tensor(mask)
