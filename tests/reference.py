"""The plain definition of a fused answer: Hugging Face models, no cache, no service, one prompt at a time."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from transformers import PreTrainedModel

from fusionroute.fusion import Sampling, SeenTokens, choose
from fusionroute.router_model import Heads


@dataclass(frozen=True)
class ReferenceToken:
    """A token, and how far its score could sink before another one would be chosen (at most 1e-3 is looked at)."""

    id: int
    expert: int | None
    logprob: float
    margin: float


@dataclass(frozen=True)
class Reference:
    """Router, heads and experts as plain models."""

    router: PreTrainedModel
    heads: Heads
    experts: list[PreTrainedModel]
    end_ids: frozenset[int] = frozenset({1})

    @torch.no_grad()
    def write(
        self, prompt: list[int], rule: str, sampling: Sampling, max_tokens: int
    ) -> list[ReferenceToken]:
        """The whole answer to a prompt."""
        tokens, answer, seen = list(prompt), list[ReferenceToken](), SeenTokens(prompt)
        for _ in range(max_tokens):
            answer.append(self.next_token(tokens, rule, sampling, seen))
            tokens.append(answer[-1].id)
            seen.add(answer[-1].id)
            if answer[-1].id in self.end_ids:
                break
        return answer

    @torch.no_grad()
    def next_token(
        self, tokens: list[int], rule: str, sampling: Sampling, seen: SeenTokens
    ) -> ReferenceToken:
        """The token after `tokens`, of which `seen` knows prompt and answer."""
        output = self.router(input_ids=torch.tensor([tokens]), output_hidden_states=True, use_cache=False)
        h, r = output.hidden_states[-1][0, -1], output.logits[0, -1].double()
        routed = int(torch.argmax(self.heads.routing_weight @ h + self.heads.routing_bias))
        if rule in ("mixture", "select"):
            w = torch.softmax((self.heads.gate_weight @ h + self.heads.gate_bias).double(), -1)
            routed = int(torch.argmax(w[:-1]))
        e = self.experts[routed](input_ids=torch.tensor([tokens]), use_cache=False).logits[0, -1].double()
        expert: int | None = routed
        if rule == "sum":
            fused = e + r
        elif rule == "gated_sum":
            u = self.heads.sum_gate_weight @ h + self.heads.sum_gate_bias
            fused = e + torch.nn.functional.softplus(u.double() + math.log(math.e - 1)) * r
        elif rule == "mixture":
            p = (1 - w[-1]) * torch.softmax(e, -1) + w[-1] * torch.softmax(r, -1)
            fused = torch.log(p)
        elif rule == "select":
            fused, expert = (r, None) if w[-1] > w[routed] else (e, routed)
        else:
            fused = e
        scores = fused.float().numpy()
        choice = choose(scores, sampling, len(tokens), seen)
        margin = self._margin(scores, sampling, len(tokens), seen, choice.token_id)
        return ReferenceToken(choice.token_id, expert, choice.logprob, margin)

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
