"""Answers for many prompts at once, decoded here without services: of the fused policy (`sum`), or of one model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fusionroute.lab.tokenizer import EOS_ID, PAD_ID
from fusionroute.router_model import load_checkpoint
from trainer.lab_family.training import load

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

BATCH_PROMPTS = 256


class SingleModel:
    """One model, loaded.

    Args:
        folder: of a causal LM.
    """

    def __init__(self, folder: Path) -> None:
        self._models = [load(str(folder)).eval()]

    @torch.no_grad()
    def answers(
        self, prompts: Sequence[Sequence[int]], max_new_tokens: int, temperature: float = 0.0, seed: int = 0
    ) -> list[list[int]]:
        """Answers as token ids, each with its end token unless it has reached `max_new_tokens`.

        Args:
            temperature: 0 takes the best token, above 0 draws.
        """
        generator = torch.Generator().manual_seed(seed)
        order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
        found: list[list[int]] = [[] for _ in prompts]
        for first in range(0, len(order), BATCH_PROMPTS):
            batch = order[first : first + BATCH_PROMPTS]
            rows = [prompts[index] for index in batch]
            for index, answer in zip(
                batch, self._batch(rows, max_new_tokens, temperature, generator), strict=True
            ):
                found[index] = answer
        return found

    def _batch(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        temperature: float,
        generator: torch.Generator,
    ) -> list[list[int]]:
        """Padded on the left, so that all rows continue at the same column; rows that have ended leave the batch."""
        width = max(len(prompt) for prompt in prompts)
        ids = torch.tensor([[PAD_ID] * (width - len(prompt)) + list(prompt) for prompt in prompts])
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        caches: list[Any] = [None] * len(self._models)
        answers: list[list[int]] = [[] for _ in prompts]
        running = list(range(len(prompts)))
        for _ in range(max_new_tokens):
            chosen = self._next(ids, mask, caches, temperature, generator)
            for index, token in zip(running, chosen.tolist(), strict=True):
                answers[index].append(token)
            goes_on = torch.nonzero(chosen != EOS_ID)[:, 0]
            if len(goes_on) == 0:
                break
            if len(goes_on) < len(running):
                running = [running[place] for place in goes_on.tolist()]
                chosen, mask = chosen[goes_on], mask[goes_on]
                for cache in caches:
                    cache.batch_select_indices(goes_on)
            ids = chosen[:, None]
            mask = torch.cat([mask, torch.ones_like(ids)], dim=1)
        return answers

    def _next(
        self, ids: Tensor, mask: Tensor, caches: list[Any], temperature: float, generator: torch.Generator
    ) -> Tensor:
        positions = (mask.cumsum(dim=1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        hidden = [
            self._last_hidden(model, ids, mask, positions, caches, index)
            for index, model in enumerate(self._models)
        ]
        rows = [model.lm_head(states) for model, states in zip(self._models, hidden, strict=True)]
        scores = self._scores(hidden, rows)
        if temperature == 0.0:
            best: Tensor = scores.argmax(dim=1)
            return best
        shares = torch.softmax(scores / temperature, dim=1)
        drawn: Tensor = torch.multinomial(shares, 1, generator=generator)[:, 0]
        return drawn

    def _scores(self, hidden: Sequence[Tensor], rows: Sequence[Tensor]) -> Tensor:
        """Scores ``[B, V]`` of the next token, of each model's last hidden states ``[B, H]`` and logits ``[B, V]``."""
        return rows[0]

    @staticmethod
    def _last_hidden(
        model: LlamaForCausalLM, ids: Tensor, mask: Tensor, positions: Tensor, caches: list[Any], index: int
    ) -> Tensor:
        output = model.model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=caches[index],
            use_cache=True,
        )
        caches[index] = output.past_key_values
        states: Tensor = output.last_hidden_state[:, -1]
        return states


class FusedPolicy(SingleModel):
    """Router and experts, loaded.

    Args:
        router: folder of a router checkpoint.
        experts: folders in the order of its heads.
    """

    def __init__(self, router: Path, experts: Sequence[Path]) -> None:
        super().__init__(router)
        heads = load_checkpoint(router).heads
        self._routing = (heads.routing_weight, heads.routing_bias)
        self._models += [load(str(folder)).eval() for folder in experts]

    def _scores(self, hidden: Sequence[Tensor], rows: Sequence[Tensor]) -> Tensor:
        routes = torch.nn.functional.linear(hidden[0], *self._routing).argmax(dim=1)
        return torch.stack(list(rows[1:]))[routes, torch.arange(len(routes))] + rows[0]
