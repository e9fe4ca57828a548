"""The calls about jobs: messages to the job store and back."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc

from fusionroute.errors import invalid
from fusionroute.v1 import trainer_pb2
from trainer.config import JOBS, JobKind
from trainer.jobs.folder import LOG_FILE
from trainer.jobs.records import Cancellation, Job, JobState
from trainer.jobs.store import JobStore
from trainer.run_context import RunProgress

if TYPE_CHECKING:
    Context = grpc.aio.ServicerContext[Any, Any]

DEFAULT_LIMIT = 100
MOST_JOBS = 1000
LOG_PIECE_BYTES = 256 * 1024
MOST_CONFIG_CHARACTERS = 1_000_000
MOST_LOG_BYTES = 2**60

_KINDS = {trainer_pb2.JobKind.Value(f"JOB_KIND_{kind.name}"): kind for kind in JobKind}
_KIND_MESSAGES = {kind: message for message, kind in _KINDS.items()}
_STATE_MESSAGES = {state: trainer_pb2.JobState.Value(f"JOB_STATE_{state.name}") for state in JobState}


class JobRpcs:
    """The part of TrainerService that is about jobs.

    Args:
        store: where jobs live.
        published: the folder of a published checkpoint by its id; raises FusionRouteError when there is none.
        poll_seconds: how soon watchers learn of a change.
    """

    def __init__(
        self, store: JobStore, published: Callable[[str], Path], *, poll_seconds: float = 0.5
    ) -> None:
        self._jobs = store
        self._published = published
        self._poll_seconds = poll_seconds

    async def SubmitJob(  # noqa: N802 - the name in the contract
        self, request: trainer_pb2.SubmitJobRequest, context: Context
    ) -> trainer_pb2.SubmitJobResponse:
        """Checks the configuration and queues the job."""
        kind = _KINDS.get(request.kind)
        if kind is None:
            raise invalid("kind", request.kind, f"one of {', '.join(each.value for each in JobKind)}")
        if len(request.config) > MOST_CONFIG_CHARACTERS:
            found, limit = f"{len(request.config)} characters", f"at most {MOST_CONFIG_CHARACTERS} characters"
            raise invalid("config", found, limit)
        config = JOBS[kind].from_json(request.config)
        if (remote := getattr(config, "remote", None)) is not None:
            # It would show keys and files of this service to whatever server a caller names.
            raise invalid("remote.url", remote.url, "for local runs only")
        config = await asyncio.to_thread(config.with_published, self._published)
        submission = await self._jobs.submit(kind, config.to_json(), request.idempotency_key)
        return trainer_pb2.SubmitJobResponse(job=job_message(submission.job), created=submission.created)

    async def GetJob(  # noqa: N802
        self, request: trainer_pb2.GetJobRequest, context: Context
    ) -> trainer_pb2.GetJobResponse:
        """The job as it is now."""
        return trainer_pb2.GetJobResponse(job=job_message(await self._jobs.get(request.job_id)))

    async def ListJobs(  # noqa: N802
        self, request: trainer_pb2.ListJobsRequest, context: Context
    ) -> trainer_pb2.ListJobsResponse:
        """The newest jobs."""
        limit = min(request.limit or DEFAULT_LIMIT, MOST_JOBS)
        jobs = await self._jobs.list_jobs(limit)
        return trainer_pb2.ListJobsResponse(jobs=[job_message(job) for job in jobs])

    async def WatchJob(  # noqa: N802
        self, request: trainer_pb2.WatchJobRequest, context: Context
    ) -> AsyncIterator[trainer_pb2.WatchJobResponse]:
        """The job now and after every change, until it has ended."""
        watching = self._jobs.watch(request.job_id, poll_seconds=self._poll_seconds)
        async with contextlib.aclosing(watching) as jobs:
            async for job in jobs:
                yield trainer_pb2.WatchJobResponse(job=job_message(job))

    async def CancelJob(  # noqa: N802
        self, request: trainer_pb2.CancelJobRequest, context: Context
    ) -> trainer_pb2.CancelJobResponse:
        """Asks for the end of a job."""
        how = Cancellation.DISCARD if request.discard else Cancellation.SAVE
        return trainer_pb2.CancelJobResponse(job=job_message(await self._jobs.cancel(request.job_id, how)))

    async def ResumeJob(  # noqa: N802
        self, request: trainer_pb2.ResumeJobRequest, context: Context
    ) -> trainer_pb2.ResumeJobResponse:
        """Queues a job again."""
        return trainer_pb2.ResumeJobResponse(job=job_message(await self._jobs.resume(request.job_id)))

    async def ReadJobLog(  # noqa: N802
        self, request: trainer_pb2.ReadJobLogRequest, context: Context
    ) -> AsyncIterator[trainer_pb2.ReadJobLogResponse]:
        """What a job has printed, in pieces."""
        offset = request.from_offset
        if offset > MOST_LOG_BYTES:
            raise invalid("from_offset", offset, f"at most {MOST_LOG_BYTES}")
        while True:
            job = await self._jobs.get(request.job_id)
            # Only text that was there before we knew that the job had ended may be taken for the last of it.
            while piece := await asyncio.to_thread(_read_piece, job, offset):
                offset += len(piece)
                yield trainer_pb2.ReadJobLogResponse(text=piece, next_offset=offset)
            if job.state.is_ended or not request.follow:
                return
            await asyncio.sleep(self._poll_seconds)


def job_message(job: Job) -> trainer_pb2.Job:
    """A job on the wire."""
    message = trainer_pb2.Job(
        job_id=job.job_id,
        kind=_KIND_MESSAGES[job.kind],
        state=_STATE_MESSAGES[job.state],
        state_reason=job.reason,
        checkpoint_id=job.checkpoint_id if job.state is JobState.SUCCEEDED else "",
        submitted_at_seconds=job.submitted_at_seconds,
        started_at_seconds=job.started_at_seconds or 0.0,
        ended_at_seconds=job.ended_at_seconds or 0.0,
        num_attempts=job.num_attempts,
        config=job.config,
        folder=job.folder,
    )
    if job.progress is not None:
        message.progress.CopyFrom(_progress_message(job.progress))
    return message


def _progress_message(progress: RunProgress) -> trainer_pb2.JobProgress:
    return trainer_pb2.JobProgress(
        stage=progress.stage,
        step=progress.step,
        num_steps=progress.num_steps,
        loss=progress.loss,
        metrics=progress.metrics,
        remaining_seconds=progress.remaining_seconds,
        note=progress.note,
    )


def _read_piece(job: Job, offset: int) -> bytes:
    """The next bytes of a job's log, none at its end or where there is no log on this machine."""
    if not job.folder:
        return b""
    try:
        with (Path(job.folder) / LOG_FILE).open("rb") as log:
            log.seek(offset)
            return log.read(LOG_PIECE_BYTES)
    except FileNotFoundError:
        return b""
