"""Metrics that all services share, and putting a daemon's metrics together.

Each service has its metrics as module-level objects in a registry of its own, so that several services in one process
do not see each other's. `Exposition` adds what only a running daemon knows: gauges read while they are scraped.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from prometheus_client import (
    CONTENT_TYPE_PLAIN_0_0_4,
    CollectorRegistry,
    Counter,
    Histogram,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.process_collector import ProcessCollector
from prometheus_client.registry import Collector
from prometheus_client.samples import Sample

if TYPE_CHECKING:
    from fusionroute.engine.steps import EngineLoad
    from fusionroute.health import ServerHealth

LATENCY_BUCKETS = (
    0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0,
)  # fmt: skip
"""Upper limits in seconds: from a small model's forward to the longest wait for an expert."""

MOST_NOTED = 512
"""Observations that may wait to be counted."""

CONTENT_TYPE = CONTENT_TYPE_PLAIN_0_0_4
"""Of `Exposition.text`."""


class NotingHistogram(Histogram):
    """A histogram for what happens with every token: observations are noted, and counted when somebody looks."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        self._noted: deque[float] = deque()
        super().__init__(*arguments, **options)

    def observe(self, amount: float, exemplar: dict[str, str] | None = None) -> None:
        """Notes an observation; exemplars are not kept."""
        noted = self._noted
        noted.append(amount)
        if len(noted) >= MOST_NOTED:
            self._count_noted()

    def _child_samples(self) -> Iterable[Sample]:
        self._count_noted()
        return super()._child_samples()

    def _count_noted(self) -> None:
        noted = self._noted
        with suppress(IndexError):  # another thread may count too
            while noted:
                super().observe(noted.popleft())


SHARED = CollectorRegistry()
"""What every daemon counts."""

RPC_SECONDS = NotingHistogram(
    "fusionroute_rpc_seconds",
    "How long calls took that this process served, streams to their end.",
    ["rpc", "code"],
    buckets=LATENCY_BUCKETS,
    registry=SHARED,
)
REDIS_SECONDS = Histogram(
    "fusionroute_redis_seconds",
    "Round trips of Redis scripts that were answered.",
    ["script"],
    buckets=LATENCY_BUCKETS,
    registry=SHARED,
)
REDIS_ERRORS = Counter(
    "fusionroute_redis_errors",
    "Attempts of Redis scripts that failed; most are tried again.",
    ["script", "reason"],
    registry=SHARED,
)

ENGINE_GAUGES = {
    "sessions": ("num_sessions", "Sessions with cached tokens."),
    "queue_depth": ("queue_depth", "Steps waiting or running."),
    "queue_limit": ("queue_limit", "Most steps that may wait or run."),
    "kv_tokens_used": ("kv_tokens_used", "Tokens for which key-value memory is in use."),
    "kv_tokens_limit": ("kv_tokens_limit", "Tokens for which there is key-value memory."),
}
ENGINE_COUNTERS = {
    "forwards": ("num_forwards", "Forwards of the model."),
    "evictions": ("num_evictions", "Sessions whose cache was given up for room."),
}


class EngineCollector(Collector):
    """The load of a service's engines, read when it is asked for; several engines are added up.

    Args:
        prefix: of the names, for example "fusionroute_expert".
        loads: of the engines that run now.
    """

    def __init__(self, prefix: str, loads: Callable[[], Sequence[EngineLoad]]) -> None:
        self._prefix = prefix
        self._loads = loads
        self._gone = dict.fromkeys(ENGINE_COUNTERS, 0)
        self._last: dict[str, int] = dict.fromkeys(ENGINE_COUNTERS, 0)

    def collect(self) -> Iterable[Metric]:
        """One metric for each number of EngineLoad."""
        loads = self._loads()
        for name, (attribute, text) in ENGINE_GAUGES.items():
            value = sum(getattr(load, attribute) for load in loads)
            yield GaugeMetricFamily(f"{self._prefix}_{name}", text, value=value)
        for name, (attribute, text) in ENGINE_COUNTERS.items():
            value = sum(getattr(load, attribute) for load in loads)
            yield CounterMetricFamily(f"{self._prefix}_{name}", text, value=self._never_less(name, value))

    def _never_less(self, name: str, value: int) -> int:
        """A counter goes on counting when an engine, and its count with it, has been closed."""
        if value < self._last[name]:
            self._gone[name] += self._last[name] - value
        self._last[name] = value
        return self._gone[name] + value


class GaugeCollector(Collector):
    """One gauge whose values are read when they are asked for.

    Args:
        name: of the metric.
        text: what it says.
        labels: names of its labels.
        read: values by the values of the labels; one without labels has the key ().
    """

    def __init__(
        self,
        name: str,
        text: str,
        labels: Sequence[str],
        read: Callable[[], dict[tuple[str, ...], float]],
    ) -> None:
        self._name, self._text, self._labels, self._read = name, text, labels, read

    def collect(self) -> Iterable[Metric]:
        """The gauge with one sample for each combination of labels."""
        family = GaugeMetricFamily(self._name, self._text, labels=self._labels)
        for key, value in self._read().items():
            family.add_metric(key, value)
        yield family


class HealthCollector(Collector):
    """What a daemon answers to probes, as gauges: what it was at the last look, about a second ago."""

    def __init__(self, health: ServerHealth) -> None:
        self._health = health

    def collect(self) -> Iterable[Metric]:
        """1 or 0."""
        health = self._health
        yield GaugeMetricFamily(
            "fusionroute_ready", "1 while work should be sent here.", value=float(health.is_ready)
        )
        yield GaugeMetricFamily(
            "fusionroute_progressing",
            "0 while pending work does not move.",
            value=float(health.is_progressing),
        )


class Exposition:
    """Everything that one daemon tells Prometheus.

    Args:
        own: the service's registry.
        collectors: what only this daemon knows.
    """

    def __init__(self, own: CollectorRegistry, collectors: Iterable[Collector] = ()) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self._registry = CollectorRegistry(auto_describe=False)
        for collector in (own, SHARED, ProcessCollector(registry=None), *collectors):
            self._registry.register(collector)  # a registry collects too

    def add(self, collector: Collector) -> None:
        """One more source."""
        self._registry.register(collector)

    def collect(self) -> Iterable[Metric]:
        """The metrics themselves."""
        return self._registry.collect()

    def text(self) -> bytes:
        """In Prometheus's text format."""
        return generate_latest(self._registry)
