"""What probes and Prometheus learn of a running expert: its steps as they end, its load, whether it is ready."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from expert_service import metrics
from expert_service.registrar import Registrar
from expert_service.served_model import ServedModel
from fusionroute import tracing
from fusionroute.engine import StepOutcome
from fusionroute.health import WhyNotReady
from fusionroute.metrics import EngineCollector, Exposition, GaugeCollector
from fusionroute.v1 import registry_pb2

STATES = ("ready", "standby", "draining", "unregistered")


def note_step(slot: str, num_tokens: int, outcome: StepOutcome, arrived: float) -> None:
    """A step was answered.

    Args:
        num_tokens: that were sent, and drafted.
        outcome: what came of it.
        arrived: time.monotonic() when it came.
    """
    num_computed = outcome.num_computed_tokens
    metrics.STEPS_OK.inc()
    metrics.STEP_QUEUE_SECONDS.observe(outcome.queue_seconds)
    metrics.STEP_FORWARD_SECONDS.observe(outcome.forward_seconds)
    metrics.STEP_BATCH_SESSIONS.observe(outcome.max_batch_sessions)
    metrics.COMPUTED_TOKENS.inc(num_computed)
    if num_tokens > num_computed:
        metrics.CACHED_TOKENS.inc(num_tokens - num_computed)
    seconds = time.monotonic() - arrived
    if tracing.is_on() and (seconds > tracing.SLOW_SECONDS or num_computed > 1):
        attributes: tracing.Attributes = {
            "slot": slot,
            "num_tokens": num_computed,
            "position": outcome.position,
            "queue_seconds": outcome.queue_seconds,
            "forward_seconds": outcome.forward_seconds,
        }
        tracing.note("prefill" if num_computed > 1 else "step", seconds, attributes)


def note_failed_step(slot: str, reason: str, arrived: float) -> None:
    """A step was refused or failed; arguments as of `note_step`."""
    metrics.STEPS.labels(outcome=reason).inc()
    if tracing.is_on():
        tracing.note("step", time.monotonic() - arrived, {"slot": slot}, error=reason)


def exposition(served: ServedModel, registrar: Registrar | None) -> Exposition:
    """All that the expert tells Prometheus."""
    return Exposition(
        metrics.REGISTRY,
        [
            EngineCollector(metrics.PREFIX, lambda: [engine.load() for engine in served.engines()]),
            GaugeCollector(
                f"{metrics.PREFIX}_registry_state",
                "1 for what the registry says of this expert, 0 for all else.",
                ("state",),
                lambda: {(state,): float(state == registry_state(registrar)) for state in STATES},
            ),
        ],
    )


def registry_state(registrar: Registrar | None) -> str:
    """One of STATES; without a router, or with its lease run out, an expert is unregistered."""
    if registrar is None or not registrar.is_registered:
        return "unregistered"
    return registry_pb2.ExpertState.Name(registrar.state).removeprefix("EXPERT_STATE_").lower()


def needs_registration(names_router: bool, registrar: Callable[[], Registrar | None]) -> WhyNotReady:
    """An expert that names a router is of use once the registry knows it; on standby it is ready to be swapped in.

    Args:
        registrar: asked each time; None until there is one.
    """

    async def why_not_ready() -> Sequence[str]:
        current = registrar()
        if not names_router or (current is not None and current.is_registered):
            return ()
        return ["unregistered: the router's registry does not hold a lease of this expert"]

    return why_not_ready
