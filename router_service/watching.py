"""What probes and Prometheus learn of a running router beside what it counts: gauges, and whether it is ready."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from redis.asyncio import Redis
from redis.exceptions import RedisError

from fusionroute.client import expert_state_name
from fusionroute.health import WhyNotReady
from fusionroute.metrics import EngineCollector, Exposition, GaugeCollector
from router_service import metrics
from router_service.breaker import BreakerState
from router_service.experts import Directory
from router_service.instances import Instance
from router_service.serving import ServedCheckpoints
from router_service.token_log import OPEN_LOGS
from router_service.turn_admission import TurnAdmission

ENGINE_PREFIX = f"{metrics.PREFIX}_engine"
SHOWN_STATES = ("ready", "standby", "draining", "vanished")


@dataclass(frozen=True, slots=True)
class RouterGauges:
    """A router's parts whose numbers are read when they are asked for."""

    served: ServedCheckpoints
    directory: Directory
    admission: TurnAdmission

    def exposition(self) -> Exposition:
        """All that the router tells Prometheus."""
        engines = EngineCollector(
            ENGINE_PREFIX, lambda: [serving.engine.load() for serving in self.served.all()]
        )
        return Exposition(metrics.REGISTRY, [engines, *self.collectors()])

    def collectors(self) -> list[GaugeCollector]:
        """One for each gauge."""
        prefix, admission = metrics.PREFIX, self.admission
        return [
            GaugeCollector(
                f"{prefix}_running_turns", "Turns written now.", (), lambda: {(): admission.num_running}
            ),
            GaugeCollector(
                f"{prefix}_running_turns_limit", "Most turns at a time.", (), lambda: {(): admission.limit}
            ),
            GaugeCollector(
                f"{prefix}_turn_tokens_reserved",
                "Key-value tokens set aside for the running turns at their longest.",
                (),
                lambda: {(): admission.tokens_reserved},
            ),
            GaugeCollector(
                f"{prefix}_turn_tokens_limit",
                "Key-value tokens that running turns may count on, of the model that has least.",
                (),
                lambda: {(): admission.budget().tokens},
            ),
            GaugeCollector(
                f"{prefix}_expert_instances",
                "Expert processes this router knows, by slot and state; a slot of the checkpoint is always listed.",
                ("slot", "state"),
                self._instances,
            ),
            GaugeCollector(
                f"{prefix}_breakers",
                "Circuit breakers of expert processes, by slot and state (closed, half_open, open).",
                ("slot", "state"),
                self._breakers,
            ),
            GaugeCollector(
                f"{prefix}_store_pending_tokens",
                "Tokens written that Redis has not confirmed yet.",
                (),
                lambda: {(): sum(log.num_pending_tokens for log in OPEN_LOGS)},
            ),
            GaugeCollector(
                f"{prefix}_checkpoints", "Checkpoints in memory.", (), lambda: {(): len(self.served.all())}
            ),
            GaugeCollector(
                f"{prefix}_promotion_revision",
                "The latest promotion this router has acted upon; 0 = none.",
                (),
                lambda: {(): self.served.promotion.revision},
            ),
        ]

    def _instances(self) -> dict[tuple[str, ...], float]:
        slots = set(self.served.current.offer.slots)
        slots.update(each.entry.slot for each in self.directory.instances.values())
        found = Counter((each.entry.slot, _state_of(each)) for each in self.directory.instances.values())
        listed: dict[tuple[str, ...], float] = {
            (slot, state): 0.0 for slot in sorted(slots) for state in SHOWN_STATES
        }
        return listed | {key: float(count) for key, count in found.items()}

    def _breakers(self) -> dict[tuple[str, ...], float]:
        instances = list(self.directory.instances.values())
        found = Counter((each.entry.slot, each.breaker.state.value) for each in instances)
        return {
            (slot, state.value): float(found[slot, state.value])
            for slot in sorted({each.entry.slot for each in instances})
            for state in BreakerState
        }


def _state_of(instance: Instance) -> str:
    return "vanished" if instance.gone_since is not None else expert_state_name(instance.entry.state)


def needs_redis(redis: Redis) -> WhyNotReady:
    """A router whose Redis does not answer should get no new turns, although running ones go on."""

    async def why_not_ready() -> Sequence[str]:
        ping: object
        try:
            ping = await redis.execute_command("PING")  # type: ignore[no-untyped-call]
        except (RedisError, OSError) as error:
            return [f"redis: {type(error).__name__}"]
        return () if ping else ["redis: no answer"]

    return why_not_ready
