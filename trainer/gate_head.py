"""A gate as training sees it: from hidden states to scores, linear or through one hidden layer."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from fusionroute.router_model import Heads
from trainer.gates_table import GatesTable

GateName = Literal["gate", "sum_gate"]


class GateHead(nn.Module):
    """A gate in float32 that says 0 to everything until it is trained.

    Args:
        hidden_size: H, of the router.
        num_outputs: n + 1, or 1 for a sum gate.
        table: its shape.
        seed: of the hidden layer's weights; the output's are zeros.
    """

    def __init__(self, hidden_size: int, num_outputs: int, table: GatesTable, seed: int) -> None:
        super().__init__()
        self.hidden: nn.Linear | None = None
        if table.shape == "mlp":
            self.hidden = _random_layer(hidden_size, table.hidden, seed)
        self.output = zero_head(hidden_size if self.hidden is None else table.hidden, num_outputs)

    def forward(self, states: Tensor) -> Tensor:
        """Scores ``[T, num_outputs]`` of hidden states ``[T, H]``, in float32 under autocast too."""
        with torch.autocast(states.device.type, enabled=False):
            inputs = states.float()
            scores: Tensor = self.output(
                inputs if self.hidden is None else functional.silu(self.hidden(inputs))
            )
            return scores


def with_gate(heads: Heads, name: GateName, parameters: Mapping[str, Tensor] | None) -> Heads:
    """Heads whose gate of this name has the parameters of a `GateHead`; None leaves it out."""
    found = {part: value.detach() for part, value in (parameters or {}).items()}
    values: dict[str, Any] = {
        f"{name}_weight": found.get("output.weight"),
        f"{name}_bias": found.get("output.bias"),
        f"{name}_hidden_weight": found.get("hidden.weight"),
        f"{name}_hidden_bias": found.get("hidden.bias"),
    }
    return replace(heads, **values)


def zero_head(num_inputs: int, num_outputs: int) -> nn.Linear:
    """A linear layer that says 0 to everything, in fp32."""
    head = nn.Linear(num_inputs, num_outputs, dtype=torch.float32)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    return head


def _random_layer(num_inputs: int, num_units: int, seed: int) -> nn.Linear:
    layer = nn.Linear(num_inputs, num_units, dtype=torch.float32)
    generator, bound = torch.Generator().manual_seed(seed), 1.0 / math.sqrt(num_inputs)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.uniform_(-bound, bound, generator=generator)
    return layer
