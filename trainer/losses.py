"""The losses of phase I and of the gates, as pure functions of tensors.

Every function takes tokens in one flat axis: T tokens, n experts, V vocabulary entries. Position p of a
causal model predicts token p + 1, so callers pass the scores, logits and labels of position p together
with the token at p + 1. `denominator` replaces the count that a mean divides by: with gradient
accumulation pass the count over all micro-batches.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

LAMBDA = 1.0 / 3.0
GATE_OFFSET = math.log(math.e - 1.0)


def lm_loss(
    logits: Tensor, gold: Tensor, supervised: Tensor, denominator: Tensor | float | None = None
) -> Tensor:
    """L_LM = mean over supervised tokens of -log softmax(r)[y].

    Args:
        logits: ``[T, V]`` the router's logits r.
        gold: ``[T]`` token ids y.
        supervised: ``[T]`` bool, which tokens count.
        denominator: what to divide the sum by; None for the number of supervised tokens.

    Returns:
        A scalar; 0 with a gradient of 0 when nothing is supervised.
    """
    losses = functional.cross_entropy(logits, gold, reduction="none")
    return _masked_mean(losses, supervised, denominator)


def informative_tokens(argmax_ids: Tensor, supervised: Tensor) -> Tensor:
    """The set S: supervised tokens where the experts' first choices are not all the same.

    Args:
        argmax_ids: ``[T, n]`` greedy token of each expert.
        supervised: ``[T]`` bool.

    Returns:
        ``[T]`` bool; all False for one expert and for experts that agree.
    """
    return supervised & (argmax_ids != argmax_ids[:, :1]).any(dim=1)


def expert_loss(
    scores: Tensor, gold_logprobs: Tensor, informative: Tensor, denominator: Tensor | float | None = None
) -> Tensor:
    """L_expert = mean over S of sum_i w_i * (-g_i), with w = softmax(scores).

    Its gradient is dL/ds_j = w_j (nll_j - sum_i w_i nll_i) / \\|S\\|.

    Args:
        scores: ``[T, n]`` routing scores W h + b, not detached.
        gold_logprobs: ``[T, n]`` g, log-probability of the gold token under each frozen expert; may hold
            anything,
            even NaN, outside of S.
        informative: ``[T]`` bool, the set S.
        denominator: what to divide the sum by; None for the size of S.

    Returns:
        A scalar; 0 with a gradient of 0 when S is empty.
    """
    nll = torch.where(informative[:, None], -gold_logprobs, torch.zeros_like(gold_logprobs))
    losses = (torch.softmax(scores, dim=1) * nll).sum(dim=1)
    return _masked_mean(losses, informative, denominator)


def sft_loss(
    logits: Tensor,
    scores: Tensor,
    gold: Tensor,
    gold_logprobs: Tensor,
    argmax_ids: Tensor,
    supervised: Tensor,
    weight: float = LAMBDA,
) -> tuple[Tensor, Tensor, Tensor]:
    """L_SFT = L_LM + lambda * L_expert; shapes as in `lm_loss` and `expert_loss`.

    Returns:
        (L_SFT, L_LM, L_expert), the latter two detached.
    """
    language = lm_loss(logits, gold, supervised)
    expert = expert_loss(scores, gold_logprobs, informative_tokens(argmax_ids, supervised))
    return language + weight * expert, language.detach(), expert.detach()


def gate_loss(
    gate_scores: Tensor, gold_logprobs: Tensor, router_gold_logprobs: Tensor, supervised: Tensor
) -> Tensor:
    """L_gate = -mean_t log( sum_k w_k exp(g_k) + w_{n+1} exp(sg(log p_r(y))) ), with w = softmax(u).

    Args:
        gate_scores: ``[T, n + 1]`` u = G sg(h); the last column is the router itself.
        gold_logprobs: ``[T, n]`` log-probability of the gold token under each expert.
        router_gold_logprobs: ``[T]`` the same under the router; its gradient is cut here.
        supervised: ``[T]`` bool.
    """
    everyone = torch.cat([gold_logprobs, router_gold_logprobs.detach()[:, None]], dim=1)
    everyone = torch.where(supervised[:, None], everyone, torch.zeros_like(everyone))
    losses = -torch.logsumexp(torch.log_softmax(gate_scores, dim=1) + everyone, dim=1)
    return _masked_mean(losses, supervised, None)


def sum_gate_factor(gate_scores: Tensor) -> Tensor:
    """softplus(u + log(e - 1)): the factor of the router's logits, the paper's 1 at u = 0; any shape."""
    return functional.softplus(gate_scores + GATE_OFFSET)


def sum_gate_loss(
    gate_scores: Tensor, expert_rows: Tensor, router_rows: Tensor, gold: Tensor, supervised: Tensor
) -> Tensor:
    """Cross entropy of the distribution softmax(e_k* + softplus(u + log(e - 1)) r).

    Args:
        gate_scores: ``[T]`` u, one score per token.
        expert_rows: ``[T, V]`` logits e_k* of the routed expert.
        router_rows: ``[T, V]`` logits r of the router; cut their gradient to train the gate alone.
        gold: ``[T]`` token ids.
        supervised: ``[T]`` bool.
    """
    fused = expert_rows + sum_gate_factor(gate_scores)[:, None] * router_rows
    return lm_loss(fused, gold, supervised)


def _masked_mean(losses: Tensor, mask: Tensor, denominator: Tensor | float | None) -> Tensor:
    """Mean of the losses under a mask; 0, still attached to the graph, where the mask is empty."""
    total = torch.where(mask, losses, torch.zeros_like(losses)).sum()
    count = mask.sum().clamp(min=1) if denominator is None else denominator
    return total / count
