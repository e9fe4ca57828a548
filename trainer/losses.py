"""The losses of both phases and of the gates, as pure functions of tensors.

Every function takes tokens in one flat axis: T tokens, n experts, V vocabulary entries. Position p of a
causal model predicts token p + 1, so callers pass the scores, logits and labels of position p together
with the token at p + 1. `denominator` replaces the count that a mean divides by: with gradient
accumulation pass the count over all micro-batches, or 1 for the sum.

Where rows of logits are too many to be held, `VocabularyHead.gold_logprobs` gives what is needed of them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

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


def gold_loss(gold_logprobs: Tensor, denominator: Tensor | float | None = None) -> Tensor:
    """L_LM from the log-probabilities ``[T]`` of targets alone: mean of -log softmax(r)[y]; 0 when T is 0."""
    return _mean(-gold_logprobs, denominator)


def informative_tokens(argmax_ids: Tensor, supervised: Tensor) -> Tensor:
    """The set S: supervised tokens where the experts' first choices are not all the same.

    Args:
        argmax_ids: ``[T, n]`` greedy token of each expert.
        supervised: ``[T]`` bool.

    Returns:
        ``[T]`` bool; all False for one expert and for experts that agree.
    """
    return supervised & (argmax_ids != argmax_ids[:, :1]).any(dim=1)


def expert_loss_tokens(
    argmax_ids: Tensor, supervised: Tensor, tokens: Literal["informative", "all"] = "informative"
) -> Tensor:
    """The tokens ``[T]`` that L_expert looks at (`sft.tokens`): the set S, or all that are supervised."""
    return supervised if tokens == "all" else informative_tokens(argmax_ids, supervised)


def expert_loss(
    scores: Tensor,
    gold_logprobs: Tensor,
    informative: Tensor,
    denominator: Tensor | float | None = None,
    aggregate: Literal["linear", "mixture"] = "linear",
) -> Tensor:
    """L_expert = mean over S of sum_i w_i * (-g_i), with w = softmax(scores).

    Its gradient is dL/ds_j = w_j (nll_j - sum_i w_i nll_i) / \\|S\\|. With `aggregate` "mixture" it is the mean of
    -log sum_i w_i exp(g_i), whose gradient is (w_j - v_j) / \\|S\\| with v = softmax(log w + g).

    Args:
        scores: ``[T, n]`` routing scores W h + b, not detached.
        gold_logprobs: ``[T, n]`` g, log-probability of the gold token under each frozen expert; may hold
            anything,
            even NaN, outside of S.
        informative: ``[T]`` bool, the set S.
        denominator: what to divide the sum by; None for the size of S.
        aggregate: `sft.aggregate`.

    Returns:
        A scalar; 0 with a gradient of 0 when S is empty.
    """
    nll = torch.where(informative[:, None], -gold_logprobs, torch.zeros_like(gold_logprobs))
    if aggregate == "mixture":
        losses = -torch.logsumexp(torch.log_softmax(scores, dim=1) - nll, dim=1)
    else:
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
    gate_scores: Tensor,
    gold_logprobs: Tensor,
    router_gold_logprobs: Tensor,
    supervised: Tensor,
    denominator: Tensor | float | None = None,
) -> Tensor:
    """L_gate = -mean_t log( sum_k w_k exp(g_k) + w_{n+1} exp(sg(log p_r(y))) ), with w = softmax(u).

    Args:
        gate_scores: ``[T, n + 1]`` u = G sg(h); the last column is the router itself.
        gold_logprobs: ``[T, n]`` log-probability of the gold token under each expert.
        router_gold_logprobs: ``[T]`` the same under the router; its gradient is cut here.
        supervised: ``[T]`` bool.
        denominator: what to divide the sum by; None for the number of supervised tokens.
    """
    everyone = torch.cat([gold_logprobs, router_gold_logprobs.detach()[:, None]], dim=1)
    everyone = torch.where(supervised[:, None], everyone, torch.zeros_like(everyone))
    losses = -torch.logsumexp(torch.log_softmax(gate_scores, dim=1) + everyone, dim=1)
    return _masked_mean(losses, supervised, denominator)


def sum_gate_factor(gate_scores: Tensor) -> Tensor:
    """softplus(u + log(e - 1)): the factor of the router's logits, the paper's 1 at u = 0; any shape."""
    return functional.softplus(gate_scores + GATE_OFFSET)


def sum_gate_loss(
    gate_scores: Tensor,
    expert_rows: Tensor,
    router_rows: Tensor,
    gold: Tensor,
    supervised: Tensor,
    denominator: Tensor | float | None = None,
) -> Tensor:
    """Cross entropy of the distribution softmax(e_k* + softplus(u + log(e - 1)) r).

    Args:
        gate_scores: ``[T]`` u, one score per token.
        expert_rows: ``[T, V]`` logits e_k* of the routed expert.
        router_rows: ``[T, V]`` logits r of the router; cut their gradient to train the gate alone.
        gold: ``[T]`` token ids.
        supervised: ``[T]`` bool.
        denominator: what to divide the sum by; None for the number of supervised tokens.
    """
    fused = expert_rows + sum_gate_factor(gate_scores)[:, None] * router_rows
    return lm_loss(fused, gold, supervised, denominator)


def routes_of(scores: Tensor) -> Tensor:
    """k ``[T]`` (int64): the expert with the highest of the routing scores ``[T, n]``, the first of equal ones."""
    return scores.detach().argmax(dim=1)


def logprobs_at(gold_logprobs: Tensor, routes: Tensor) -> Tensor:
    """g_{k(p)}[p] ``[T]`` of gold log-probs ``[T, n]`` for routes ``[T]``; no gradient."""
    return gold_logprobs.detach().gather(1, routes[:, None].long())[:, 0]


def routed_logprobs(gold_logprobs: Tensor, scores: Tensor) -> Tensor:
    """`logprobs_at` the routes of routing scores ``[T, n]``, which get no gradient from it."""
    return logprobs_at(gold_logprobs, routes_of(scores))


@dataclass(frozen=True, slots=True)
class PairMargins:
    """What the preference loss and its metrics are made of, for P pairs, each ``[P]``.

    Attributes:
        margin: beta [(l_theta - l_ref)_chosen - (l_theta - l_ref)_rejected] + bias; with `log_partition` also
            - beta [log Z_chosen - log Z_rejected]. The only one with a gradient.
        bias: beta * bias_scale * (l_exp_chosen - l_exp_rejected).
        chosen_logratio, rejected_logratio: l_theta - l_ref of the router alone.
        chosen_reward, rejected_reward: the two sides of the margin, each with its share of the bias.
    """

    margin: Tensor
    bias: Tensor
    chosen_logratio: Tensor
    rejected_logratio: Tensor
    chosen_reward: Tensor
    rejected_reward: Tensor


def pair_margins(
    policy_logprobs: Tensor,
    reference_logprobs: Tensor,
    expert_logprobs: Tensor,
    row_index: Tensor,
    *,
    beta: float = 0.1,
    bias_scale: float = 1.0,
    bias_reduction: Literal["sum", "mean"] = "sum",
    log_partition: Tensor | None = None,
) -> PairMargins:
    """Margins of P pairs, whose rows are chosen, rejected, chosen, rejected, ... (method, section 3).

    Args:
        policy_logprobs: ``[T]`` log pi_theta of each target of the 2 P rows; gets the gradient.
        reference_logprobs: ``[2 P]`` l_ref, summed over each row's targets.
        expert_logprobs: ``[T]`` g_{k(p)}[p]; no gradient.
        row_index: ``[T]`` the row of each target, 0 .. 2 P - 1.
        beta: of the margin.
        bias_scale: 1 = CDPO, 0 = plain DPO on the router.
        bias_reduction: l_exp is the sum over a row's targets, or their mean.
        log_partition: ``[T]`` log Z where the policy is the normalised product: l_fused = l_theta + l_exp - log Z,
            of which l_exp is the bias; gets a gradient. None = `cdpo.policy` "product".
    """
    num_rows = len(reference_logprobs)
    assert num_rows % 2 == 0, f"{num_rows} rows are no pairs"
    logratio = _row_sums(policy_logprobs, row_index, num_rows) - reference_logprobs.detach()
    complement = logratio
    if log_partition is not None:
        complement = logratio - _row_sums(log_partition, row_index, num_rows)
    expert = _row_sums(expert_logprobs.detach(), row_index, num_rows)
    if bias_reduction == "mean":
        expert = expert / row_index.bincount(minlength=num_rows).clamp(min=1)
    expert = beta * bias_scale * expert if bias_scale else torch.zeros_like(expert)
    reward = beta * complement + expert
    bias = expert[0::2] - expert[1::2]
    return PairMargins(
        margin=beta * (complement[0::2] - complement[1::2]) + bias,
        bias=bias,
        chosen_logratio=logratio[0::2].detach(),
        rejected_logratio=logratio[1::2].detach(),
        chosen_reward=reward[0::2].detach(),
        rejected_reward=reward[1::2].detach(),
    )


def cdpo_loss(margins: PairMargins, denominator: Tensor | float | None = None) -> Tensor:
    """L_CDPO = mean over pairs of -log sigmoid(margin); 0 with a gradient of 0 where there are none.

    Args:
        margins: of P pairs.
        denominator: what to divide the sum by; None for P.
    """
    return _mean(-functional.logsigmoid(margins.margin), denominator)


def _masked_mean(losses: Tensor, mask: Tensor, denominator: Tensor | float | None) -> Tensor:
    """Mean of the losses under a mask; 0, still attached to the graph, where the mask is empty."""
    total = torch.where(mask, losses, torch.zeros_like(losses)).sum()
    count = mask.sum().clamp(min=1) if denominator is None else denominator
    return total / count


def _mean(losses: Tensor, denominator: Tensor | float | None) -> Tensor:
    return losses.sum() / (max(len(losses), 1) if denominator is None else denominator)


def _row_sums(values: Tensor, row_index: Tensor, num_rows: int) -> Tensor:
    return values.new_zeros(num_rows).index_add(0, row_index.long(), values)
