"""Ways to ask a router for an answer: the same services, other request options."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, cast

from evaluation.findings import SystemNote
from fusionroute.questions import ScoringOptions
from fusionroute.v1.router_pb2 import CombineRule


@dataclass(frozen=True, slots=True)
class Way:
    """One way to ask.

    Attributes:
        name: for programs, for example "expert/math" or "sum"; unique within a suite.
        label: for people.
        combine: the rule, as requests name it.
        expert: the slot to use at every token; "" = as routed.
        is_random: a drawn expert at every token instead of the routed one.
        note: what a reader has to know.
    """

    name: str
    label: str
    combine: str
    expert: str = ""
    is_random: bool = False
    note: str = ""

    def options(self) -> ScoringOptions:
        """The options of a request."""
        options: dict[str, Any] = {"combine": self.combine}
        if self.expert:
            options["expert"] = self.expert
        if self.is_random:
            options["expert_choice"] = "random"
        return cast(ScoringOptions, options)

    def of(self, checkpoint: str, label: str = "") -> Way:
        """The same way, asked of another router checkpoint: its name in front of the name, the label behind."""
        told = f"{self.label}, {label or checkpoint}"
        return Way(f"{checkpoint}/{self.name}", told, self.combine, self.expert, self.is_random, self.note)

    def system(self) -> SystemNote:
        """What reports say of it."""
        return SystemNote(
            self.name, self.label, "expert" if self.name.startswith("expert/") else "served", self.note
        )


ROUTER_ALONE = Way("router", "router alone", "router")
ROUTING_ONLY = Way("route", "routing only", "route")
SUM = Way("sum", "FusionRoute: sum", "sum")
GATED = (
    Way("gated_sum", "gated sum", "gated_sum"),
    Way("mixture", "mixture", "mixture"),
    Way("select", "select", "select"),
)
ENSEMBLE = Way("ensemble", "uniform ensemble", "ensemble", note="mean of all experts' log-probabilities")
PROXY = Way("proxy", "proxy-tuning: r + e - base", "proxy")
RANDOM = Way("random", "router + random expert", "sum", is_random=True)


def expert_ways(slots: Sequence[str]) -> list[Way]:
    """Each expert alone."""
    return [Way(f"expert/{slot}", f"expert {slot}", "route", slot) for slot in slots]


def fixed_ways(slots: Sequence[str]) -> list[Way]:
    """The router's logits added to always the same expert's."""
    return [Way(f"fixed/{slot}", f"router + always {slot}", "sum", slot) for slot in slots]


def main_ways(slots: Sequence[str], rules: Iterable[str]) -> list[Way]:
    """Those that users choose among: experts alone, the router alone, routing only, the sum and the gated rules.

    Args:
        slots: of the checkpoint, in its order.
        rules: that the router says it can serve, as requests name them.
    """
    known = set(rules)
    ways = (ROUTER_ALONE, ROUTING_ONLY, SUM, *GATED)
    return [*expert_ways(slots), *(way for way in ways if way.combine in known)]


def available_ways(slots: Sequence[str], rules: Iterable[str]) -> list[Way]:
    """Every way that a router can be asked in.

    Args:
        slots: of the checkpoint, in its order.
        rules: that the router says it can serve, as requests name them.
    """
    known = set(rules)
    others = [way for way in (ENSEMBLE, PROXY, RANDOM) if way.combine in known]
    return [*main_ways(slots, known), *others, *fixed_ways(slots)]


def rule_names(rules: Iterable[CombineRule.ValueType]) -> list[str]:
    """As requests name them, from the wire."""
    return [CombineRule.Name(rule).removeprefix("COMBINE_RULE_").lower() for rule in rules]
