"""One worker's work on one job: from the claim until the job has ended, waits again, or belongs to somebody else.

Redis may be away for as long as it likes meanwhile: the run goes on, and what happened is told when Redis is back.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from pathlib import Path
from typing import TypeVar

import structlog

from fusionroute.background import end_task
from fusionroute.errors import FusionRouteError, Reason, SessionStateError, Unavailable
from trainer.jobs.child import JOB_COMMAND, JobProcess
from trainer.jobs.folder import Assignment, Broken, Done, JobFolder, StoppedEarly, reason_of
from trainer.jobs.leftovers import end_processes
from trainer.jobs.process import ProcessExit
from trainer.jobs.publishing import publish
from trainer.jobs.records import Cancellation, Claim, Job, JobState
from trainer.jobs.store import JobStore

POLL_SECONDS = 0.1
REDIS_PAUSE_SECONDS = 0.5
PUT_ASIDE_REASON = "its trainer was stopped"

Answer = TypeVar("Answer")

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Workshop:
    """Where and how jobs are done.

    Attributes:
        jobs_dir: each job has a folder in it.
        checkpoints_dir: where checkpoints are published; best on the same file system.
        heartbeat_seconds: how often a job's lease is renewed and its progress told.
        stop_seconds: how long a run may take to save once it is asked to stop.
        retry_seconds: how long a job waits after its process has died; the second time twice as long.
        command: what stands before the folder on the command line of a job's process.
        environment: added to that process's.
    """

    jobs_dir: Path
    checkpoints_dir: Path
    heartbeat_seconds: float = 2.0
    stop_seconds: float = 120.0
    retry_seconds: float = 5.0
    command: tuple[str, ...] = JOB_COMMAND
    environment: Mapping[str, str] = field(default_factory=dict)


class Wish(IntEnum):
    """What is wanted of a running attempt; a greater one replaces a smaller one."""

    GO_ON = 0
    PUT_ASIDE = 1
    """Save, stop, back to the queue."""
    CANCEL = 2
    """Save and stop."""
    CANCEL_DISCARDING = 3
    """Stop."""
    LET_GO = 4
    """The job is somebody else's: stop at once and touch nothing."""


@dataclass(frozen=True, slots=True)
class Died:
    """The process ended without saying how the run did."""

    how: str


Ending = Done | StoppedEarly | Broken | Died


class Attempt:
    """Works on a claimed job."""

    def __init__(self, claim: Claim, store: JobStore, workshop: Workshop) -> None:
        self.job = claim.job
        self._lease = claim.lease
        self._store = store
        self._workshop = workshop
        self._folder = JobFolder(workshop.jobs_dir / claim.job.job_id)
        self._target = workshop.checkpoints_dir / checkpoint_id_of(claim.job)
        self._wish = Wish.GO_ON
        self._stop_by: float | None = None
        self._log = log.bind(job=claim.job.job_id, fence=claim.lease.fence)

    def put_aside(self, within_seconds: float) -> None:
        """Asks for the job to be saved and given back to the queue; what is not done by then is ended."""
        self._want(Wish.PUT_ASIDE, within_seconds)

    async def run(self) -> None:
        """Returns when there is nothing more to do; never raises but for cancellation."""
        self._beats = asyncio.create_task(self._keep_lease())
        try:
            ending = await self._work()
            self._log.info("attempt_ended", ending=type(ending).__name__, wish=self._wish.name)
            if self._wish is not Wish.LET_GO:
                await self._settle(ending)
        except SessionStateError as error:
            self._log.warning("job_lost", message=error.message)
        except Unavailable as error:
            # Its lease will end, and whoever claims it then finds the outcome in the folder.
            self._log.warning("job_left_behind", message=error.message)
        except Exception as error:
            self._log.exception("attempt_failed")
            await self._give_back(f"{type(error).__name__}: {error}")
        finally:
            await end_task(self._beats)

    async def _work(self) -> Ending:
        """Runs the job's process, unless an earlier attempt has left its result behind."""
        if num_ended := await asyncio.to_thread(end_processes, self._folder.path):
            self._log.warning("leftover_processes_ended", num_processes=num_ended)
        try:
            done = await asyncio.to_thread(self._prepare)
        except OSError as error:
            return Broken(reason_of(error), f"{self._folder.path} cannot be written: {error}")
        if done is not None:
            return done
        process = await JobProcess.start(self._workshop.command, self._folder, self._workshop.environment)
        self._log.info("job_started", pid=process.pid, attempt=self.job.num_attempts)
        try:
            exit_code = await self._accompany(process)
        finally:
            await asyncio.shield(process.end())
        return await asyncio.to_thread(self._folder.read_outcome) or _death(exit_code)

    def _prepare(self) -> Done | None:
        """Makes the folder ready, or finds in it what an earlier attempt has made."""
        outcome = self._folder.read_outcome()
        if isinstance(outcome, Done) and (outcome.artifact.exists() or self._target.exists()):
            return outcome
        self._folder.write_assignment(
            Assignment(self.job.kind, self.job.config, stop_seconds=self._workshop.stop_seconds)
        )
        self._folder.forget_outcome()
        return None

    async def _accompany(self, process: JobProcess) -> int:
        """Waits until the process has ended, passing on what is wished."""
        ended = asyncio.create_task(process.wait())
        obeyed = Wish.GO_ON
        while not ended.done():
            if self._wish > obeyed:
                obeyed = self._wish
                self._log.info("stopping", wish=obeyed.name)
                process.ask_to_stop(save=obeyed is not Wish.CANCEL_DISCARDING)
            if self._stop_by and time.monotonic() >= self._stop_by:
                process.kill()
            await asyncio.wait({ended}, timeout=POLL_SECONDS)
        return ended.result()

    async def _settle(self, ending: Ending) -> None:
        """Tells the store how it ended."""
        match ending:
            case Done():
                await self._succeed(ending)
            case Broken(reason, message):
                await self._finish(JobState.FAILED, f"{message} ({reason.value})")
            case StoppedEarly() | Died() if self._wish in (Wish.CANCEL, Wish.CANCEL_DISCARDING):
                how = "" if isinstance(ending, StoppedEarly) else f"; {ending.how}"
                await self._finish(JobState.CANCELLED, f"on request{how}")
            case StoppedEarly() | Died() if self._wish is Wish.PUT_ASIDE:
                await end_task(self._beats)
                await self._insist(lambda: self._store.release(self._lease, PUT_ASIDE_REASON))
            case StoppedEarly():
                await self._give_back("a signal stopped it")
            case Died(how):
                await self._give_back(how)

    async def _succeed(self, done: Done) -> None:
        """Publishes what was made. From the commitment on nothing but a full disk can come between."""
        if not done.is_checkpoint:
            await self._finish(JobState.SUCCEEDED, f"made {done.artifact}")
            return
        if not await self._insist(lambda: self._store.commit(self._lease, self._target.name)):
            await self._finish(JobState.CANCELLED, "on request, when it was about to publish")
            return
        try:
            await asyncio.to_thread(publish, done.artifact, self._target)
        except OSError as error:
            self._log.exception("publishing_failed", target=str(self._target))
            why = f"{self._target} cannot be published: {error}; resume the job to try again"
            await self._finish(JobState.FAILED, f"{why} ({reason_of(error).value})")
            return
        await self._finish(JobState.SUCCEEDED, f"published {self._target.name}")

    async def _finish(self, state: JobState, reason: str) -> None:
        # The last progress first: afterwards nothing is taken any more.
        await end_task(self._beats)
        progress = await asyncio.to_thread(self._folder.read_progress)
        await self._insist(lambda: self._store.heartbeat(self._lease, progress))
        await self._insist(lambda: self._store.finish(self._lease, state, reason))
        self._log.info("job_ended", state=state.value, reason=reason)

    async def _give_back(self, reason: str) -> None:
        """After a death, which is counted."""
        await end_task(self._beats)
        delay_seconds = self._workshop.retry_seconds * 2.0**self.job.num_deaths
        try:
            state = await self._insist(
                lambda: self._store.release(self._lease, reason, has_died=True, delay_seconds=delay_seconds)
            )
        except FusionRouteError as error:
            self._log.warning("job_left_behind", message=error.message)
        else:
            self._log.warning("job_process_died", reason=reason, state=state.value)

    async def _insist(self, ask: Callable[[], Awaitable[Answer]]) -> Answer:
        """Asks the store until it answers, or until we are told to put the job aside and the time for it is over."""
        while True:
            try:
                return await ask()
            except Unavailable:
                if self._wish is Wish.PUT_ASIDE and self._stop_by and time.monotonic() >= self._stop_by:
                    raise
            await asyncio.sleep(REDIS_PAUSE_SECONDS)

    async def _keep_lease(self) -> None:
        """Renews the lease, tells the progress, and hears what is wished."""
        is_away = False
        while True:
            try:
                progress = await asyncio.to_thread(self._folder.read_progress)
                asked = await self._store.heartbeat(self._lease, progress)
            except SessionStateError as error:
                self._log.warning("lease_lost", message=error.message)
                self._want(Wish.LET_GO, 0.0)
                return
            except Unavailable as error:
                if not is_away:
                    self._log.warning("store_away", message=error.message, note="the run goes on")
                is_away = True
            else:
                is_away = False
                if asked is Cancellation.SAVE:
                    self._want(Wish.CANCEL, self._workshop.stop_seconds)
                elif asked is Cancellation.DISCARD:
                    self._want(Wish.CANCEL_DISCARDING, self._workshop.stop_seconds)
            await asyncio.sleep(self._workshop.heartbeat_seconds)

    def _want(self, wish: Wish, within_seconds: float) -> None:
        if wish > self._wish:
            self._wish = wish
            stop_by = time.monotonic() + within_seconds
            self._stop_by = min(stop_by, self._stop_by or stop_by)


def checkpoint_id_of(job: Job) -> str:
    """The name under which a job's checkpoint is published: one for each job, whatever its attempts."""
    return f"{json.loads(job.config)['name']}-{job.kind.value}-{job.job_id}"


def _death(exit_code: int) -> Ending:
    if exit_code == ProcessExit.STORAGE_FULL:
        return Broken(Reason.STORAGE_FULL, "no room is left on the disk that holds the job's folder")
    if exit_code == ProcessExit.FOLDER_BUSY:
        return Died("its folder is held by another process")
    how = f"signal {-exit_code}" if exit_code < 0 else f"exit code {exit_code}"
    return Died(f"its process died with {how}")
