"""The PromQL expressions of the dashboard and of the alerts."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]

MONITORING = Path(__file__).parents[1] / "monitoring"
DASHBOARD = MONITORING / "grafana" / "dashboards" / "fusionroute.json"
RULES = MONITORING / "rules.yml"
_COMPARISON = re.compile(r"^(?P<what>.+) (?:==|>|<) [0-9.]+$", re.DOTALL)


def dashboard() -> dict[str, Any]:
    """As Grafana reads it."""
    read: dict[str, Any] = json.loads(DASHBOARD.read_text())
    return read


def dashboard_expressions(rate_interval: str = "1m") -> list[str]:
    """Of all panels, with Grafana's own variable replaced."""
    return [
        target["expr"].replace("$__rate_interval", rate_interval)
        for panel in dashboard()["panels"]
        for target in panel.get("targets", [])
    ]


def alerts() -> list[dict[str, Any]]:
    """The rules as Prometheus reads them."""
    return [rule for group in yaml.safe_load(RULES.read_text())["groups"] for rule in group["rules"]]


def alert_measures() -> list[str]:
    """What the alerts compare, without the comparison; it has data also while nothing is wrong."""
    found = []
    for rule in alerts():
        match = _COMPARISON.match(rule["expr"])
        assert match is not None, f"{rule['alert']} is not WHAT COMPARED NUMBER: {rule['expr']}"
        found.append(match["what"])
    return found


def metric_names(expression: str) -> set[str]:
    """The names of metrics in an expression: all that looks like ours, or like what Prometheus and its client add."""
    return set(
        re.findall(
            r"\b(?:fusionroute_[a-z0-9_]+|process_[a-z0-9_]+|up)\b(?!\s*\()", _without_labels(expression)
        )
    )


def _without_labels(expression: str) -> str:
    grouping = re.sub(r"\b(by|without|ignoring|on|group_left|group_right) ?\([^)]*\)", "", expression)
    return re.sub(r"\{[^}]*\}", "", grouping)
