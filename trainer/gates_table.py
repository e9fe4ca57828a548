"""The table `[gates]` of a training job: form of the gates, and how they are fitted."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

Count = Annotated[int, Field(ge=1)]
Rate = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class GatesTable(BaseModel):
    """Method section 6: heads trained after the router, on hidden states that stand still."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)

    enabled: bool = Field(default=True, description="Train gates.")
    shape: Literal["linear", "mlp"] = Field(
        default="linear", description="`mlp`: one hidden layer between the router's state and the scores."
    )
    hidden: Count = Field(default=64, description="Units of that layer.")
    reaches_router: bool = Field(
        default=False,
        description="The gate learns together with the router in phase I, which it changes; false: after it, on "
        "states that stand still.",
    )
    loss_weight: Rate = Field(
        default=1.0, description="Of the gate's loss beside L_SFT where it reaches the router."
    )
    sum_gate: bool = Field(
        default=True, description="The one-row gate of `gated_sum`; needs the experts here."
    )
    max_targets: Count = Field(default=200_000, description="Targets whose hidden states are kept in memory.")
    num_steps: Count = Field(default=400, description="Optimiser steps.")
    batch_targets: Count = Field(default=288, description="Targets of one step.")
    learning_rate: Rate = Field(
        default=1e-2,
        description="After the warm-up; then cosine to a tenth, or on the router's schedule if it reaches it.",
    )
    warmup_steps: Annotated[int, Field(ge=0)] = Field(default=20, description="Linear.")

    @property
    def learn_with_router(self) -> bool:
        """Whether the loop of phase I trains a gate."""
        return self.enabled and self.reaches_router


def _fitted(gates: GatesTable) -> GatesTable:
    if gates.learn_with_router:
        raise ValueError(
            "`reaches_router` should be false: gates learn together with the router in sft alone"
        )
    return gates


FittedGates = Annotated[GatesTable, AfterValidator(_fitted)]
"""Gates that are fitted after the router."""
