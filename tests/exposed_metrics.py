"""Every metric that any of the daemons can expose; `python -m tests.exposed_metrics` prints the table of the docs."""

from __future__ import annotations

from typing import Any
from unittest.mock import MagicMock

from prometheus_client import CollectorRegistry
from prometheus_client.metrics_core import Metric
from prometheus_client.process_collector import ProcessCollector
from prometheus_client.registry import Collector

import router_service.metrics
from expert_service.watching import exposition
from fusionroute.health import ServerHealth
from fusionroute.metrics import SHARED, EngineCollector, HealthCollector
from router_service.watching import ENGINE_PREFIX, RouterGauges
from trainer.watching import TrainerGauges


def exposed_metrics() -> list[Metric]:
    """By name, each one once."""
    stand_in: Any = MagicMock()
    stand_in.engines.return_value = []
    router = RouterGauges(stand_in, stand_in, stand_in)
    sources: list[Collector | CollectorRegistry] = [
        SHARED,
        router_service.metrics.REGISTRY,
        *router.collectors(),
        EngineCollector(ENGINE_PREFIX, list),
        HealthCollector(ServerHealth([])),
        ProcessCollector(registry=None),
    ]
    found = [metric for source in sources for metric in source.collect()]
    found += exposition(stand_in, None).collect()
    found += TrainerGauges(stand_in, stand_in).exposition().collect()
    return sorted({metric.name: metric for metric in found}.values(), key=lambda metric: metric.name)


def series_names(metric: Metric) -> list[str]:
    """The series of a metric as PromQL names them."""
    endings = {"counter": ["_total"], "histogram": ["_bucket", "_sum", "_count"]}.get(metric.type, [""])
    return [metric.name + ending for ending in endings]


def metrics_table() -> str:
    """The rows of docs/monitoring.md."""
    lines = ["| metric | kind | what it says |", "|---|---|---|"]
    for metric in exposed_metrics():
        if metric.name.startswith("fusionroute_"):
            name = metric.name if metric.type == "histogram" else series_names(metric)[0]
            lines.append(f"| `{name}` | {metric.type} | {metric.documentation} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(metrics_table(), end="")
