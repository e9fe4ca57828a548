"""The plain definition of a fused answer: Hugging Face models, no cache, no service, one prompt at a time."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from transformers import PreTrainedModel

from fusionroute.fusion import drawn_expert
from fusionroute.router_model import Heads
from fusionroute.sampling import Sampling, SeenTokens, choose


@dataclass(frozen=True)
class ReferenceToken:
    """A token, and how far its score could sink before another one would be chosen (at most 1e-3 is looked at)."""

    id: int
    expert: int | None
    logprob: float
    margin: float


@dataclass(frozen=True)
class Reference:
    """Router, heads and experts as plain models; the base is that of the rule proxy."""

    router: PreTrainedModel
    heads: Heads
    experts: list[PreTrainedModel]
    end_ids: frozenset[int] = frozenset({1})
    base: PreTrainedModel | None = None

    @torch.no_grad()
    def write(
        self,
        prompt: list[int],
        rule: str,
        sampling: Sampling,
        max_tokens: int,
        *,
        draws_experts: bool = False,
    ) -> list[ReferenceToken]:
        """The whole answer to a prompt."""
        tokens, answer, seen = list(prompt), list[ReferenceToken](), SeenTokens(prompt)
        for _ in range(max_tokens):
            answer.append(self.next_token(tokens, rule, sampling, seen, draws_experts))
            tokens.append(answer[-1].id)
            seen.add(answer[-1].id)
            if answer[-1].id in self.end_ids:
                break
        return answer

    @torch.no_grad()
    def next_token(
        self, tokens: list[int], rule: str, sampling: Sampling, seen: SeenTokens, draws_experts: bool = False
    ) -> ReferenceToken:
        """The token after `tokens`, of which `seen` knows prompt and answer."""
        output = self.router(input_ids=torch.tensor([tokens]), output_hidden_states=True, use_cache=False)
        h, r = output.hidden_states[-1][0, -1], output.logits[0, -1].double()
        routed = int(torch.argmax(self.heads.routing_weight @ h + self.heads.routing_bias))
        if rule in ("mixture", "select"):
            w = torch.softmax(self._gate("gate", h).double(), -1)
            routed = int(torch.argmax(w[:-1]))
        if draws_experts:
            routed = drawn_expert(sampling.seed, len(tokens), len(self.experts))
        e = self._row(self.experts[routed], tokens)
        expert: int | None = routed
        if rule == "sum":
            fused = e + r
        elif rule == "gated_sum":
            u = self._gate("sum_gate", h)
            fused = e + torch.nn.functional.softplus(u.double() + math.log(math.e - 1)) * r
        elif rule == "mixture":
            p = (1 - w[-1]) * torch.softmax(e, -1) + w[-1] * torch.softmax(r, -1)
            fused = torch.log(p)
        elif rule == "select":
            fused, expert = (r, None) if w[-1] > w[routed] else (e, routed)
        elif rule == "ensemble":
            fused, expert = torch.stack([self._row(model, tokens) for model in self.experts]).mean(0), None
        elif rule == "proxy":
            assert self.base is not None
            fused = e + r - self._row(self.base, tokens)
        else:
            fused = e
        scores = fused.float().numpy()
        choice = choose(scores, sampling, len(tokens), seen)
        margin = self._margin(scores, sampling, len(tokens), seen, choice.token_id)
        return ReferenceToken(choice.token_id, expert, choice.logprob, margin)

    def _gate(self, name: str, h: torch.Tensor) -> torch.Tensor:
        tensors = self.heads.tensors()
        if f"{name}_hidden.weight" in tensors:
            units = tensors[f"{name}_hidden.weight"] @ h + tensors[f"{name}_hidden.bias"]
            h = units * torch.sigmoid(units)
        return tensors[f"{name}.weight"] @ h + tensors[f"{name}.bias"]

    @staticmethod
    def _row(model: PreTrainedModel, tokens: list[int]) -> torch.Tensor:
        logits: torch.Tensor = model(input_ids=torch.tensor([tokens]), use_cache=False).logits
        return logits[0, -1].double()

    @staticmethod
    def _margin(
        scores: np.ndarray, sampling: Sampling, position: int, seen: SeenTokens, chosen: int
    ) -> float:
        """How far the chosen token's score can sink before another one is chosen, found by sinking it."""
        for depth in (1e-5, 2e-5, 5e-5, 1e-4, 1e-3):
            sunk = scores.copy()
            sunk[chosen] -= depth
            if choose(sunk, sampling, position, seen).token_id != chosen:
                return depth / 2
        return math.inf
