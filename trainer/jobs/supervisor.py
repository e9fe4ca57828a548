"""Takes jobs from the store and works on them, a few at a time."""

from __future__ import annotations

import asyncio

import structlog

from fusionroute.errors import FusionRouteError
from trainer.jobs.attempt import PUT_ASIDE_REASON, Attempt, Workshop
from trainer.jobs.leftovers import end_processes
from trainer.jobs.records import Job
from trainer.jobs.store import JobStore

log = structlog.get_logger(__name__)


class Supervisor:
    """The worker side of a trainer.

    Args:
        store: where jobs come from.
        workshop: where and how they are done.
        max_running_jobs: at a time.
        poll_seconds: how soon a new job is noticed.
    """

    def __init__(
        self, store: JobStore, workshop: Workshop, *, max_running_jobs: int = 1, poll_seconds: float = 0.5
    ) -> None:
        self._store = store
        self._workshop = workshop
        self._max_running_jobs = max_running_jobs
        self._poll_seconds = poll_seconds
        self._running: dict[Attempt, asyncio.Task[None]] = {}
        self._is_draining = False
        self.num_rounds = 0
        """Times the store was asked for work, with or without an answer: the pulse."""

    @property
    def num_running(self) -> int:
        """Jobs that are being worked on."""
        return len(self._running)

    async def run(self) -> None:
        """Takes jobs for as long as the task lives."""
        is_away = False
        while True:
            self.num_rounds += 1
            try:
                while len(self._running) < self._max_running_jobs and not self._is_draining:
                    if not await self._take_one():
                        break
                is_away = False
            except FusionRouteError as error:
                if not is_away:
                    log.warning("store_away", message=error.message)
                is_away = True
            await asyncio.sleep(self._poll_seconds)

    async def drain(self, seconds: float) -> None:
        """Takes no more jobs; saves the running ones and gives them back to the queue within the time."""
        self._is_draining = True
        tasks = list(self._running.values())
        for attempt in self._running:
            attempt.put_aside(within_seconds=0.8 * seconds)
        if tasks:
            await asyncio.wait(tasks)

    async def close(self) -> None:
        """Ends what is still running, at once."""
        self._is_draining = True
        tasks = list(self._running.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _take_one(self) -> bool:
        running = [attempt.job.job_id for attempt in self._running]
        claim = await self._store.claim_any(self._workshop.jobs_dir, except_jobs=running)
        if claim is None:
            return False
        if isinstance(claim, Job):
            log.warning("job_ended", job=claim.job_id, state=claim.state.value, reason=claim.reason)
            await asyncio.to_thread(end_processes, self._workshop.jobs_dir / claim.job_id)
            return True
        if self._is_draining:  # since we asked
            await self._store.release(claim.lease, PUT_ASIDE_REASON)
            return False
        attempt = Attempt(claim, self._store, self._workshop)
        task = asyncio.create_task(attempt.run(), name=f"job-{claim.job.job_id}")
        self._running[attempt] = task
        task.add_done_callback(lambda _: self._running.pop(attempt))
        return True
