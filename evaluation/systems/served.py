"""What is compared: the same services, asked in different ways; a system is a choice of request options."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from fusionroute.v1.router_pb2 import CombineRule, GenerateRequest


@dataclass(frozen=True, slots=True)
class System:
    """A way to ask the router for an answer.

    Attributes:
        name: for programs, for example "expert/math" or "sum".
        label: for people.
        combine: the combine rule to ask for.
        fixed_expert: the slot to use at every token; "" = as routed.
    """

    name: str
    label: str
    combine: CombineRule.ValueType
    fixed_expert: str = ""

    def request(self, prompt: str, max_tokens: int) -> GenerateRequest:
        """A greedy request of this system."""
        request = GenerateRequest(text=prompt, combine=self.combine, fixed_expert=self.fixed_expert)
        request.sampling.max_tokens = max_tokens
        request.sampling.temperature = 0.0
        return request


ROUTER_ALONE = System("router", "router alone", CombineRule.COMBINE_RULE_ROUTER)
ROUTING_ONLY = System("route", "routing only", CombineRule.COMBINE_RULE_ROUTE)
FUSED_SUM = System("sum", "fused: sum", CombineRule.COMBINE_RULE_SUM)
PREFERRED_SUM = System("cdpo/sum", "fused: sum, after CDPO", CombineRule.COMBINE_RULE_SUM)
"""Asked of a router that has been through phase II; all others of the one before."""
GATED = (
    System("gated_sum", "fused: gated sum", CombineRule.COMBINE_RULE_GATED_SUM),
    System("mixture", "fused: mixture", CombineRule.COMBINE_RULE_MIXTURE),
    System("select", "fused: select", CombineRule.COMBINE_RULE_SELECT),
)


def systems_of(slots: Sequence[str], available: Iterable[CombineRule.ValueType]) -> list[System]:
    """Each expert alone, the router alone, routing only, the plain sum, and the gated rules it can serve.

    Args:
        slots: of the checkpoint, in its order.
        available: the combine rules that the router says it can serve.
    """
    rules = set(available)
    experts = [System(f"expert/{slot}", f"expert {slot}", ROUTING_ONLY.combine, slot) for slot in slots]
    return [
        *experts,
        *(system for system in (ROUTER_ALONE, ROUTING_ONLY, FUSED_SUM, *GATED) if system.combine in rules),
    ]
