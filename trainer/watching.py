"""What probes and Prometheus learn of a running trainer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from prometheus_client import CollectorRegistry

from fusionroute.errors import FusionRouteError
from fusionroute.health import WhyNotReady
from fusionroute.metrics import Exposition, GaugeCollector
from trainer.jobs.records import JobState
from trainer.jobs.store import JobStore
from trainer.jobs.supervisor import Supervisor

PREFIX = "fusionroute_trainer"
REGISTRY = CollectorRegistry()
MOST_COUNTED_JOBS = 1000


class TrainerGauges:
    """A trainer's numbers; those of the store are asked for by `refresh`."""

    def __init__(self, jobs: JobStore, supervisor: Supervisor) -> None:
        self._jobs, self._supervisor = jobs, supervisor
        self._by_state: Counter[str] = Counter()

    async def refresh(self) -> None:
        """Asks the store which jobs there are, the newest MOST_COUNTED_JOBS of them. Raises as the store."""
        jobs = await self._jobs.list_jobs(MOST_COUNTED_JOBS)
        self._by_state = Counter(job.state.value for job in jobs)

    def exposition(self) -> Exposition:
        """All that the trainer tells Prometheus."""
        return Exposition(
            REGISTRY,
            [
                GaugeCollector(
                    f"{PREFIX}_jobs",
                    "Jobs in the store, by state; trainers that share it all tell the same.",
                    ("state",),
                    lambda: {(state.value,): self._by_state[state.value] for state in JobState},
                ),
                GaugeCollector(
                    f"{PREFIX}_running_jobs",
                    "Jobs that this trainer works on.",
                    (),
                    lambda: {(): self._supervisor.num_running},
                ),
            ],
        )

    def needs_store(self) -> WhyNotReady:
        """A trainer whose store does not answer can take no jobs."""

        async def why_not_ready() -> Sequence[str]:
            try:
                await self._jobs.list_jobs(1)
            except FusionRouteError as error:
                return [f"redis: {error.message}"]
            return ()

        return why_not_ready
