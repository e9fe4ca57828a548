"""Jobs in Redis: what is to be done, who does it, and how it ended. The store is the truth about a job's state.

    fr:job:{namespace}:job:<id>   hash   configuration, state, fence, progress ...; vanishes long after the end
    fr:job:{namespace}:open       zset   jobs that wait or run, by when they may be claimed: a running one's lease
    fr:job:{namespace}:all        zset   jobs by submission

A worker claims a job and is given a fence, a number that only grows. Everything it tells carries the fence: who
was overtaken by another worker is refused, however late its word arrives. Every operation is one round trip and
may be repeated.
"""

from __future__ import annotations

import asyncio
import hashlib
import re
import uuid
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from redis.asyncio import Redis

from fusionroute.errors import InvalidRequest, Reason, SessionStateError, invalid
from fusionroute.redis_scripts import ScriptRunner, load_script
from trainer.config import JobKind
from trainer.jobs.records import (
    Cancellation,
    Claim,
    Job,
    JobState,
    Lease,
    parse_job,
    progress_to_json,
)
from trainer.run_context import RunProgress

_JOB_ID = re.compile(r"[0-9a-f]{12}")
_KEY_CHARACTERS = range(1, 129)
_MOST_CANDIDATES = 32


@dataclass(frozen=True, slots=True)
class Submission:
    """Answer to `submit`."""

    job: Job
    created: bool
    """False: the key had made the job before."""


class JobStore:
    """Jobs in one Redis.

    Args:
        client: from `fusionroute.private_redis.connect`.
        lease_seconds: a worker that is silent for so long may be replaced.
        max_deaths: a job whose workers died so often has failed.
        ttl_seconds: an ended job is forgotten after so long.
        namespace: stores of different names share nothing.
        deadline_seconds: how long an operation may take, repetitions included.

    Every method raises Unavailable (STORE_UNAVAILABLE) when Redis did not answer by then.
    """

    def __init__(
        self,
        client: Redis,
        *,
        lease_seconds: float = 15.0,
        max_deaths: int = 3,
        ttl_seconds: float = 90 * 86_400.0,
        namespace: str = "default",
        deadline_seconds: float = 5.0,
    ) -> None:
        self._runner = ScriptRunner(client, deadline_seconds=deadline_seconds)
        self._prefix = f"fr:job:{{{namespace}}}"
        self._ttl_ms = _milliseconds(ttl_seconds)
        self._lease_ms = _milliseconds(lease_seconds)
        self._max_deaths = max_deaths
        self.lease_seconds = lease_seconds

    async def submit(self, kind: JobKind, config: str, idempotency_key: str) -> Submission:
        """Queues a job. The same key again returns the job that it made.

        Raises:
            InvalidRequest: INVALID_FIELD, the key is empty or too long; KEY_REUSED, it made a job of another
                configuration.
        """
        job_id = job_id_of(idempotency_key)
        answer = await self._run("submit", job_id, kind.value, config, uuid.uuid4().hex)
        if answer[0] == b"reused":
            message = f"idempotency_key = {idempotency_key!r} made job {job_id} of another configuration"
            raise InvalidRequest(Reason.KEY_REUSED, message, metadata={"job_id": job_id})
        return Submission(parse_job(job_id, answer[1]), created=answer[0] == b"done")

    async def get(self, job_id: str) -> Job:
        """A job as it is now.

        Raises:
            SessionStateError: JOB_UNKNOWN.
        """
        answer = await self._run("read", job_id, "")
        return parse_job(job_id, answer[1])

    async def list_jobs(self, limit: int) -> list[Job]:
        """At most `limit` jobs, newest first."""
        answer = await self._runner.run(
            load_script("trainer.jobs", "list"), [f"{self._prefix}:all", f"{self._prefix}:job:"], [limit]
        )
        return [parse_job(job_id.decode(), pairs) for job_id, pairs in answer[1:]]

    async def watch(self, job_id: str, *, poll_seconds: float = 0.5) -> AsyncGenerator[Job, None]:
        """The job now and after every change, until it has ended.

        Raises:
            SessionStateError: JOB_UNKNOWN.
        """
        known: str | int = ""
        while True:
            answer = await self._run("read", job_id, known)
            if answer[0] == b"done":
                job = parse_job(job_id, answer[1])
                known = job.revision
                yield job
                if job.state.is_ended:
                    return
            await asyncio.sleep(poll_seconds)

    async def claim_any(self, jobs_dir: Path, *, except_jobs: Sequence[str] = ()) -> Claim | Job | None:
        """The right to work on the job that has waited longest, None when there is none.

        A job whose workers have died too often, or that was cancelled when its worker had died, ends here; it is
        returned as it is now, so that somebody sees that nothing of it runs any more.

        Args:
            jobs_dir: the job is told that its folder lies there.
            except_jobs: not these, whatever the store says of their leases.
        """
        keys = [f"{self._prefix}:open"]
        wanted = _MOST_CANDIDATES + len(except_jobs)
        answer = await self._runner.run(load_script("trainer.jobs", "claimable"), keys, [wanted])
        for job_id in (candidate.decode() for candidate in answer[1:]):
            if job_id not in except_jobs:
                claim = await self._claim(job_id, jobs_dir / job_id)
                if claim is not None:
                    return claim
        return None

    async def _claim(self, job_id: str, folder: Path) -> Claim | Job | None:
        owner = uuid.uuid4().hex
        try:
            answer = await self._run("claim", job_id, owner, self._lease_ms, self._max_deaths, str(folder))
        except SessionStateError:  # forgotten
            return None
        if answer[0] == b"ended":
            return parse_job(job_id, answer[1])
        if answer[0] != b"done":
            return None
        return Claim(Lease(job_id, int(answer[1])), parse_job(job_id, answer[2]))

    async def heartbeat(self, lease: Lease, progress: RunProgress | None = None) -> Cancellation | None:
        """Renews a lease, also one that has run out but that nobody else has taken.

        Returns:
            What somebody who wants the job cancelled asks for.

        Raises:
            SessionStateError: STALE_FENCE, the job is not this worker's any more; JOB_UNKNOWN.
        """
        told = "" if progress is None else progress_to_json(progress)
        answer = await self._run("heartbeat", lease.job_id, lease.fence, self._lease_ms, told)
        return Cancellation(answer[1].decode()) if answer[1] else None

    async def release(
        self, lease: Lease, reason: str, *, has_died: bool = False, delay_seconds: float = 0.0
    ) -> JobState:
        """Gives a job back to the queue. A lease that is lost already raises as `heartbeat` does.

        Args:
            reason: why it waits again, for people.
            has_died: its worker did; counted.
            delay_seconds: until it may be claimed.

        Returns:
            QUEUED; CANCELLED where somebody has asked for that; FAILED where its workers have died too often.
        """
        deaths = self._max_deaths if has_died else ""
        delay_ms = round(delay_seconds * 1000)
        answer = await self._run("release", lease.job_id, lease.fence, reason, delay_ms, deaths)
        return JobState(answer[1].decode())

    async def commit(self, lease: Lease, checkpoint_id: str) -> bool:
        """The point of no return: the job will succeed with this checkpoint, whoever carries it out.

        Returns:
            False when the job was cancelled first, so that nothing must be published.

        Raises:
            SessionStateError: STALE_FENCE or JOB_UNKNOWN: nothing must be published either.
        """
        answer = await self._run("commit", lease.job_id, lease.fence, checkpoint_id)
        return bool(answer[0] == b"done")

    async def finish(self, lease: Lease, state: JobState, reason: str) -> None:
        """Ends a job.

        Raises:
            SessionStateError: STALE_FENCE or JOB_UNKNOWN.
        """
        assert state.is_ended, state
        await self._run("finish", lease.job_id, lease.fence, state.value, reason)

    async def cancel(self, job_id: str, how: Cancellation) -> Job:
        """Ends a job that waits; asks the worker of a running one to stop. Again = the same.

        Raises:
            SessionStateError: JOB_STATE, it has ended otherwise or is about to publish; JOB_UNKNOWN.
        """
        answer = await self._run("cancel", job_id, how.value)
        job = parse_job(job_id, answer[1])
        if answer[0] == b"late":
            raise _in_state(job, "its checkpoint is being published already")
        if answer[0] == b"over" and job.state is not JobState.CANCELLED:
            raise _in_state(job, "only a job that waits or runs can be cancelled")
        return job

    async def resume(self, job_id: str) -> Job:
        """Queues a cancelled or failed job again. One that waits or runs stays as it is.

        Raises:
            SessionStateError: JOB_STATE, it has succeeded or is just being cancelled; JOB_UNKNOWN.
        """
        answer = await self._run("resume", job_id)
        job = parse_job(job_id, answer[1])
        if answer[0] == b"stopping":
            raise _in_state(job, "it was asked to stop; wait until it is cancelled")
        if answer[0] == b"over":
            raise _in_state(job, "only a cancelled or failed job can be resumed")
        return job

    async def _run(self, verb: str, job_id: str, *arguments: str | int) -> Sequence[Any]:
        if not _JOB_ID.fullmatch(job_id):
            raise _unknown(job_id)
        keys = [f"{self._prefix}:{part}" for part in (f"job:{job_id}", "open", "all")]
        script = load_script("trainer.jobs", "job", verb)
        answer = await self._runner.run(script, keys, [job_id, self._ttl_ms, *arguments])
        if answer[0] == b"unknown":
            raise _unknown(job_id)
        if answer[0] == b"stale":
            message = (
                f"job {job_id} is {answer[2].decode()} under fence {int(answer[1])}: another has taken it"
            )
            raise SessionStateError(Reason.STALE_FENCE, message)
        return answer


def job_id_of(idempotency_key: str) -> str:
    """The id of the job that a key makes, 12 hexadecimal digits: a function of the key, so submitting is idempotent.

    Raises:
        InvalidRequest: INVALID_FIELD, not 1 to 128 characters.
    """
    if len(idempotency_key) not in _KEY_CHARACTERS:
        raise invalid("idempotency_key", idempotency_key, "1 to 128 characters")
    return hashlib.sha256(idempotency_key.encode()).hexdigest()[:12]


def _unknown(job_id: str) -> SessionStateError:
    return SessionStateError(
        Reason.JOB_UNKNOWN, f"job_id = {job_id[:100]!r} is not known: see `fusionroute jobs list`"
    )


def _in_state(job: Job, limit: str) -> SessionStateError:
    message = f"job {job.job_id} is {job.state.value}: {limit}"
    return SessionStateError(Reason.JOB_STATE, message, metadata={"state": job.state.value})


def _milliseconds(seconds: float) -> int:
    return max(round(seconds * 1000), 1)
