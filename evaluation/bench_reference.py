"""What the served stack is measured against: the same models in one process, on Hugging Face's own caches."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fusionroute.router_model import load_checkpoint


def load_causal_lm(folder: str | Path) -> Any:
    """A transformers causal LM in evaluation mode, in the number format of its weights."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    return AutoModelForCausalLM.from_pretrained(str(folder), dtype="auto", trust_remote_code=False).eval()


@dataclass(slots=True)
class CachedModel:
    """A model with the cache of one session."""

    model: Any
    cache: Any = None
    num_cached: int = 0

    def forget(self) -> None:
        """Begins a new session."""
        from transformers import DynamicCache

        self.cache, self.num_cached = DynamicCache(config=self.model.config), 0

    def feed(self, token_ids: Sequence[int], *, with_hidden: bool = False) -> tuple[Tensor, Tensor | None]:
        """Feeds what is not cached; float32 logits [V] and, if wanted, hidden state [H] of the last token."""
        ids = torch.tensor([list(token_ids[self.num_cached :])])
        output = self.model(
            ids,
            past_key_values=self.cache,
            logits_to_keep=1,
            output_hidden_states=with_hidden,
            use_cache=True,
        )
        self.num_cached = len(token_ids)
        hidden = output.hidden_states[-1][0, -1].float() if with_hidden else None
        return output.logits[0, -1].float(), hidden


@dataclass(slots=True)
class CachedFusion:
    """Router and experts in one process: e + r at every token, experts catching up only when chosen."""

    router: CachedModel
    experts: list[CachedModel]
    routing_weight: Tensor
    routing_bias: Tensor
    # the expert chosen at each token of the last answer
    chosen: list[int] = field(default_factory=list)

    @classmethod
    def load(cls, router: str | Path, experts: Mapping[str, str | Path]) -> CachedFusion:
        """Loads a router checkpoint and its experts by slot.

        Raises:
            ModelRejected: the checkpoint is not one.
            KeyError: a slot of the checkpoint has no expert.
        """
        checkpoint = load_checkpoint(router)
        models = [CachedModel(load_causal_lm(experts[slot])) for slot in checkpoint.manifest.slots]
        heads = checkpoint.heads
        return cls(
            CachedModel(load_causal_lm(router)),
            models,
            heads.routing_weight.float(),
            heads.routing_bias.float(),
        )

    def generate(self, prompt_ids: Sequence[int], num_tokens: int) -> list[int]:
        """Greedy, `num_tokens` new ids, end of sequence or not."""
        for model in (self.router, *self.experts):
            model.forget()
        self.chosen = []
        token_ids = list(prompt_ids)
        with torch.inference_mode():
            for _ in range(num_tokens):
                complement, hidden = self.router.feed(token_ids, with_hidden=True)
                assert hidden is not None
                expert = int(torch.argmax(self.routing_weight @ hidden + self.routing_bias))
                logits, _ = self.experts[expert].feed(token_ids)
                token_ids.append(int(torch.argmax(logits + complement)))
                self.chosen.append(expert)
        return token_ids[len(prompt_ids) :]


def generate_with_one(model: Any, prompt_ids: Sequence[int], num_tokens: int) -> list[int]:
    """Hugging Face's own `generate`, greedy, `num_tokens` new ids, end of sequence or not."""
    ids = torch.tensor([list(prompt_ids)])
    with torch.inference_mode():
        output = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=num_tokens,
            min_new_tokens=num_tokens,
            pad_token_id=0,
        )
    return [int(token) for token in output[0, len(prompt_ids) :]]


def seconds_of(work: Any) -> tuple[float, Any]:
    """How long a call takes, and what it gives."""
    started_at = time.perf_counter()
    result = work()
    return time.perf_counter() - started_at, result
