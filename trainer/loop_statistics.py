"""What is watched during training: sums made in each forward, divided and named only when they are logged.

A forward adds one vector to another; nothing is read from the device until a log step.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from trainer.losses import PairMargins

PARTS = ("lm", "expert", "cdpo", "gate")
"""Parts of the loss; a router that trains no gate has the first three."""
_TALLIES = ("targets", "informative", "chosen_targets", "rejected_targets", "tokens")
_PAIRS = (
    "pairs",
    "margins",
    "accuracies",
    "chosen_reward",
    "rejected_reward",
    "chosen_logratio",
    "rejected_logratio",
    "bias",
    "bias_squares",
    "sigmoid_neg_margin",
    "flips",
)
_FIXED = (*_TALLIES, "entropy", *_PAIRS)


def target_statistics(tallies: Tensor, scores: Tensor, of_pairs: Tensor | None) -> Tensor:
    """Sums of one forward.

    Args:
        tallies: ``[5]`` as in `trainer.batches.Batch`.
        scores: ``[T, n]`` routing scores of all targets, detached.
        of_pairs: from `pair_statistics`; None without pairs.

    Returns:
        ``[17 + n]`` float32: the tallies, routing entropy, sums over pairs, targets routed to each expert.
    """
    logs = torch.log_softmax(scores, dim=1)
    entropy = -(logs.exp() * logs).sum()
    shares = torch.bincount(scores.argmax(dim=1), minlength=scores.shape[1])
    if of_pairs is None:
        of_pairs = tallies.new_zeros(len(_PAIRS))
    return torch.cat([tallies, entropy[None], of_pairs, shares.float()])


def pair_statistics(margins: PairMargins, flips: Tensor) -> Tensor:
    """Sums over P pairs: ``[11]`` float32. `flips` ``[u]`` bool: which targets are routed otherwise than in phase I."""
    margin = margins.margin.detach()
    rows = torch.stack(
        [
            torch.ones_like(margin),
            margin,
            (margin > 0).to(margin.dtype),
            margins.chosen_reward,
            margins.rejected_reward,
            margins.chosen_logratio,
            margins.rejected_logratio,
            margins.bias,
            margins.bias.square(),
            functional.sigmoid(-margin),
        ]
    )
    return torch.cat([rows.sum(dim=1), flips.sum().float()[None]])


def num_statistics(num_experts: int) -> int:
    """Length of the vector."""
    return len(_FIXED) + num_experts


def named(statistics: Sequence[float], part_sums: Sequence[float], slots: Sequence[str]) -> dict[str, float]:
    """The metrics of a stretch of steps, under TRL's names where it has them; parts without data are left out.

    Args:
        statistics: summed vectors of all forwards and processes.
        part_sums: ``[3]`` sums of L_LM, L_expert, L_CDPO, or ``[4]`` with L_gate.
        slots: of the experts.
    """
    total = dict(zip(_FIXED, statistics, strict=False))
    shares = statistics[len(_FIXED) :]
    metrics: dict[str, float] = {}
    for part, value, count in zip(PARTS, part_sums, _part_counts(total), strict=False):
        if count > 0:
            metrics[f"loss/{part}"] = value / count
    if (routed := sum(shares)) > 0:
        metrics |= {f"expert_share/{slot}": share / routed for slot, share in zip(slots, shares, strict=True)}
        metrics["routing_entropy"] = total["entropy"] / routed
    return metrics | _of_pairs(total)


def _part_counts(total: dict[str, float]) -> tuple[float, float, float, float]:
    return total["targets"], total["informative"], total["pairs"], total["targets"]


def _of_pairs(total: dict[str, float]) -> dict[str, float]:
    pairs = total["pairs"]
    if pairs == 0:
        return {}
    bias = total["bias"] / pairs
    return {
        "flip_rate": total["flips"] / max(1.0, total["chosen_targets"] + total["rejected_targets"]),
        "rewards/chosen": total["chosen_reward"] / pairs,
        "rewards/rejected": total["rejected_reward"] / pairs,
        "rewards/margins": total["margins"] / pairs,
        "rewards/accuracies": total["accuracies"] / pairs,
        "logratio/chosen": total["chosen_logratio"] / pairs,
        "logratio/rejected": total["rejected_logratio"] / pairs,
        "bias/mean": bias,
        "bias/std": math.sqrt(max(0.0, total["bias_squares"] / pairs - bias**2)),
        "sigmoid_neg_margin": total["sigmoid_neg_margin"] / pairs,
        "length/chosen": total["chosen_targets"] / pairs,
        "length/rejected": total["rejected_targets"] / pairs,
    }


def num_tokens(statistics: Sequence[float]) -> float:
    """Tokens read, padding not counted."""
    return statistics[_TALLIES.index("tokens")]
