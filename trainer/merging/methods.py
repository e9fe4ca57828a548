"""What merging does to one tensor, as pure functions. b is the base, m_k the models, d_k = m_k - b.

    average   sum_k s_k m_k / sum_k s_k                          Model soups
    task      b + sum_k s_k d_k                                  task arithmetic
    dare      b + sum_k s_k drop(d_k) / (1 - p)                  each number of d_k is dropped with probability p
    ties      b + mean over agreeing k of s_k trim(d_k)          trim keeps the share `density` of largest magnitude;
              k agrees where its sign is that of the sum over all k, and only numbers that are not 0 are averaged

All of them work number by number once the thresholds of trim are known, so a tensor may be merged piece by piece.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

import torch
from torch import Tensor

from fusionroute.errors import invalid

MAX_SEED = 2**63 - 1


class MergeMethod(StrEnum):
    """How models become one."""

    AVERAGE = "average"
    TASK = "task"
    DARE = "dare"
    TIES = "ties"

    @property
    def needs_base(self) -> bool:
        """Whether it works on differences from a base."""
        return self is not MergeMethod.AVERAGE


@dataclass(frozen=True, slots=True)
class MergeSettings:
    """A method with its numbers.

    Attributes:
        method: how.
        scales: s_k, one for each model, or one for all; of an average only their proportions count.
        drop_rate: p of `dare`, 0 to below 1.
        density: share of numbers that `ties` keeps of each tensor, above 0 to 1.
        seed: of what `dare` drops.

    Raises:
        InvalidRequest: INVALID_FIELD, naming field, value and limit.
    """

    method: MergeMethod
    scales: tuple[float, ...] = (1.0,)
    drop_rate: float = 0.5
    density: float = 0.2
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.scales or not all(abs(scale) < float("inf") for scale in self.scales):
            raise invalid("scales", self.scales, "one finite number for all models, or one for each")
        if self.method is MergeMethod.AVERAGE and not (min(self.scales) >= 0 and sum(self.scales) > 0):
            raise invalid("scales", self.scales, "not negative and not all 0 for an average")
        if not 0 <= self.drop_rate < 1:
            raise invalid("drop_rate", self.drop_rate, "0 to below 1")
        if not 0 < self.density <= 1:
            raise invalid("density", self.density, "above 0, at most 1")
        if not 0 <= self.seed <= MAX_SEED:
            raise invalid("seed", self.seed, f"0 to {MAX_SEED}")

    def for_models(self, num_models: int) -> tuple[float, ...]:
        """s_k of each of so many models. Raises InvalidRequest where there is another number of scales."""
        if len(self.scales) == 1:
            return self.scales * num_models
        if len(self.scales) != num_models:
            raise invalid("scales", self.scales, f"1 or {num_models} numbers for {num_models} models")
        return self.scales


def average(models: Sequence[Tensor], scales: Sequence[float]) -> Tensor:
    """Weighted mean; equal models give themselves, to the bit."""
    first, total = models[0], sum(scales)
    merged = first.clone()
    for model, scale in zip(models[1:], scales[1:], strict=True):
        merged += (model - first) * (scale / total)
    return merged


def task_arithmetic(base: Tensor, models: Sequence[Tensor], scales: Sequence[float]) -> Tensor:
    """The base and the scaled differences of all models from it."""
    merged = base.clone()
    for model, scale in zip(models, scales, strict=True):
        merged += (model - base) * scale
    return merged


def dare(
    base: Tensor,
    models: Sequence[Tensor],
    scales: Sequence[float],
    drop_rate: float,
    generators: Sequence[torch.Generator],
) -> Tensor:
    """Task arithmetic on differences of which a random part is dropped and the rest made larger by as much.

    Args:
        generators: one for each model; they move on, so that the next piece of a tensor has other draws.
    """
    merged = base.clone()
    for model, scale, generator in zip(models, scales, generators, strict=True):
        kept = torch.rand(base.shape, generator=generator) >= drop_rate
        merged += (model - base) * kept * (scale / (1.0 - drop_rate))
    return merged


def ties(
    base: Tensor, models: Sequence[Tensor], scales: Sequence[float], thresholds: Sequence[float]
) -> Tensor:
    """The mean of the trimmed differences that have the elected sign.

    Args:
        thresholds: of each model, from `trim_threshold` of the whole tensor.
    """
    total, trimmed = torch.zeros_like(base), []
    for model, scale, threshold in zip(models, scales, thresholds, strict=True):
        difference = model - base
        trimmed.append(difference * (difference.abs() >= threshold) * scale)
        total += trimmed[-1]
    elected = total.sign()
    agreed, count = torch.zeros_like(base), torch.zeros_like(base)
    for difference in trimmed:
        agrees = (difference.sign() == elected) & (difference != 0)
        agreed += difference * agrees
        count += agrees
    return base + agreed / count.clamp(min=1)


def trim_threshold(difference: Tensor, density: float) -> float:
    """The magnitude of the smallest number that is kept; at least one is. Equal ones are all kept."""
    kept = max(1, round(density * difference.numel()))
    return float(difference.abs().flatten().kthvalue(difference.numel() - kept + 1).values)


def generator_for(seed: int, tensor_name: str, model: int) -> torch.Generator:
    """What `dare` draws from for one tensor of one model, whatever the order of tensors and the shards."""
    digest = hashlib.sha256(f"{seed}/{model}/{tensor_name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
