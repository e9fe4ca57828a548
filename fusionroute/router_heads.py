"""What a router reads off its hidden state: which expert to ask, and how much to trust whom."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from fusionroute.fusion import HeadLayout

_HEADS = ("routing", "gate", "sum_gate", "gate_hidden", "sum_gate_hidden")
_PARTS = ("weight", "bias")

Scores = Callable[[Tensor], Tensor]
"""Hidden states [m, H] -> scores [m, k] in float32, laid out as `Heads.layout` says."""


@dataclass(frozen=True, slots=True)
class Heads:
    """Maps of the router's final hidden state h [H]: linear, or for the gates through one hidden layer of u units.

    Attributes:
        routing_weight, routing_bias: [n, H], [n]; routing scores, one for each expert.
        gate_weight, gate_bias: [n + 1, H or u], [n + 1]; the last row is the router itself.
        sum_gate_weight, sum_gate_bias: [1, H or u], [1]; scales the complement in `gated_sum`.
        gate_hidden_weight, gate_hidden_bias: [u, H], [u]; what the gate reads is silu of this. None = it reads h.
        sum_gate_hidden_weight, sum_gate_hidden_bias: the same for the sum gate.
    """

    routing_weight: Tensor
    routing_bias: Tensor
    gate_weight: Tensor | None = None
    gate_bias: Tensor | None = None
    sum_gate_weight: Tensor | None = None
    sum_gate_bias: Tensor | None = None
    gate_hidden_weight: Tensor | None = None
    gate_hidden_bias: Tensor | None = None
    sum_gate_hidden_weight: Tensor | None = None
    sum_gate_hidden_bias: Tensor | None = None

    @property
    def layout(self) -> HeadLayout:
        """Where which score stands in the output of `scores`."""
        return HeadLayout(
            num_experts=self.routing_weight.shape[0],
            has_gate=self.gate_weight is not None,
            has_sum_gate=self.sum_gate_weight is not None,
        )

    def tensors(self) -> dict[str, Tensor]:
        """The tensors under the names they have on disk."""
        named = {f"{head}.{part}": getattr(self, f"{head}_{part}") for head in _HEADS for part in _PARTS}
        return {name: tensor.contiguous() for name, tensor in named.items() if tensor is not None}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], num_experts: int, hidden_size: int) -> Heads:
        """Heads of the given sizes. Raises ValueError naming the tensor that is missing or of another shape."""
        rows = {"routing": num_experts, "gate": num_experts + 1, "sum_gate": 1}
        values: dict[str, Tensor] = {}
        for head, num_rows in rows.items():
            units, num_inputs = f"{head}_hidden", hidden_size
            is_deep = units in _HEADS and _has(tensors, units)
            if is_deep:
                num_inputs = len(_found(tensors, f"{units}.bias"))
                values |= _checked(tensors, units, num_inputs, hidden_size)
            if is_deep or head == "routing" or _has(tensors, head):
                values |= _checked(tensors, head, num_rows, num_inputs)
        unknown = set(tensors) - {f"{head}.{part}" for head in _HEADS for part in _PARTS}
        if unknown:
            raise ValueError(f"unknown tensors {', '.join(sorted(unknown))}")
        return cls(**values)

    def gate_inputs(self, hidden: Tensor) -> Tensor:
        """What the gate's rows read of hidden states [m, H]: [m, H] these themselves, or [m, u] its units."""
        units = self._part("gate_hidden")
        return hidden.float() if units is None else functional.silu(functional.linear(hidden.float(), *units))

    def to_scores(self, device: str | torch.device = "cpu") -> Scores:
        """The function from hidden states to scores, on a device."""
        heads = [head for head in ("routing", "gate", "sum_gate") if self._part(head)]
        if not any(self._part(f"{head}_hidden") for head in heads):
            return self._joined(heads, device)
        return SeveralScores(tuple(self._scores(head, device) for head in heads))

    def _part(self, head: str) -> tuple[Tensor, Tensor] | None:
        weight, bias = getattr(self, f"{head}_weight", None), getattr(self, f"{head}_bias", None)
        return None if weight is None or bias is None else (weight.float(), bias.float())

    def _scores(self, head: str, device: str | torch.device) -> Scores:
        scores, units = self._joined([head], device), f"{head}_hidden"
        return HiddenLayerScores(self._joined([units], device), scores) if self._part(units) else scores

    def _joined(self, heads: Sequence[str], device: str | torch.device) -> LinearScores:
        weights, biases = zip(*(part for head in heads if (part := self._part(head))), strict=True)
        return LinearScores(torch.cat(weights).to(device), torch.cat(biases).to(device))


@dataclass(frozen=True, slots=True)
class LinearScores:
    """One matrix, in which all heads may stand that are linear."""

    weight: Tensor
    bias: Tensor

    def __call__(self, hidden: Tensor) -> Tensor:
        return functional.linear(hidden.float(), self.weight, self.bias)


@dataclass(frozen=True, slots=True)
class HiddenLayerScores:
    """A gate with one hidden layer."""

    units: LinearScores
    output: LinearScores

    def __call__(self, hidden: Tensor) -> Tensor:
        return self.output(functional.silu(self.units(hidden)))


@dataclass(frozen=True, slots=True)
class SeveralScores:
    """Heads of different forms side by side."""

    heads: tuple[Scores, ...]

    def __call__(self, hidden: Tensor) -> Tensor:
        return torch.cat([head(hidden) for head in self.heads], dim=1)


def _has(tensors: Mapping[str, Tensor], head: str) -> bool:
    return any(f"{head}.{part}" in tensors for part in _PARTS)


def _found(tensors: Mapping[str, Tensor], name: str) -> Tensor:
    if name not in tensors:
        raise ValueError(f"{name} is missing")
    return tensors[name]


def _checked(tensors: Mapping[str, Tensor], head: str, num_rows: int, num_inputs: int) -> dict[str, Tensor]:
    """Weight [rows, inputs] and bias [rows] of a head, by the names of their fields."""
    values: dict[str, Tensor] = {}
    for part, shape in zip(_PARTS, ((num_rows, num_inputs), (num_rows,)), strict=True):
        tensor = _found(tensors, f"{head}.{part}")
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{head}.{part} has shape {tuple(tensor.shape)}, expected {shape}")
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{head}.{part} holds numbers that are not finite")
        values[f"{head}_{part}"] = tensor
    return values
