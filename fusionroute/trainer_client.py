"""What is needed to talk to a trainer: typed calls, our errors, and watching that outlives a restart of it.

async with TrainerClient.open("127.0.0.1:50070") as trainer:
    submitted = await trainer.submit("sft", config_json, idempotency_key)
    async with aclosing(trainer.watch(submitted.job.job_id)) as jobs:
        async for job in jobs: ...
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable
from contextlib import aclosing, asynccontextmanager
from typing import TypeVar

import grpc

from fusionroute.access import ClientAccess
from fusionroute.calls import answer_of, answers_of
from fusionroute.errors import Unavailable
from fusionroute.grpc_runtime import backoff_seconds, channel
from fusionroute.v1 import trainer_pb2, trainer_pb2_grpc
from fusionroute.v1.trainer_pb2 import (
    Checkpoint,
    Job,
    JobKind,
    JobState,
    ListCheckpointsResponse,
    ReadJobLogResponse,
    RollbackCheckpointResponse,
    SubmitJobResponse,
)

CALL_TIMEOUT_SECONDS = 15.0
PROMOTION_TIMEOUT_SECONDS = 600.0
STREAM_TIMEOUT_SECONDS = 3600.0
PATIENCE_SECONDS = 60.0

ENDED_STATES = frozenset(
    {JobState.JOB_STATE_SUCCEEDED, JobState.JOB_STATE_FAILED, JobState.JOB_STATE_CANCELLED}
)

Answer = TypeVar("Answer")


class TrainerClient:
    """One connection to a trainer. All methods raise FusionRouteError as the trainer meant it."""

    def __init__(self, connection: grpc.aio.Channel, address: str) -> None:
        self.address = address
        self._trainer = trainer_pb2_grpc.TrainerServiceStub(connection)

    @classmethod
    @asynccontextmanager
    async def open(cls, address: str, access: ClientAccess | None = None) -> AsyncIterator[TrainerClient]:
        """A client for the trainer at host:port, for as long as the block lasts.

        Args:
            access: certificates and key to show; None = what the environment says (`ClientAccess.from_environment`).
        """
        access = access or ClientAccess.from_environment()
        async with channel(address, access=access) as connection:
            yield cls(connection, address)

    async def submit(self, kind: str, config: str, idempotency_key: str) -> SubmitJobResponse:
        """Queues a job; the same key again returns the job that it made.

        Args:
            kind: "label", "sft", "pairs", "cdpo" or "extend".
            config: JSON, as `JobConfig.to_json` writes it.
            idempotency_key: 1 to 128 characters.

        Raises:
            FusionRouteError: INVALID_FIELD naming the field; KEY_REUSED, the key made a job of another configuration.
        """
        request = trainer_pb2.SubmitJobRequest(
            kind=job_kind(kind), config=config, idempotency_key=idempotency_key
        )
        return await self._ask(self._trainer.SubmitJob(request, timeout=CALL_TIMEOUT_SECONDS))

    async def get(self, job_id: str) -> Job:
        """A job as it is now. Raises JOB_UNKNOWN."""
        request = trainer_pb2.GetJobRequest(job_id=job_id)
        return (await self._ask(self._trainer.GetJob(request, timeout=CALL_TIMEOUT_SECONDS))).job

    async def list_jobs(self, limit: int = 0) -> list[Job]:
        """The newest jobs, newest first; 0 = 100 of them."""
        request = trainer_pb2.ListJobsRequest(limit=limit)
        return list((await self._ask(self._trainer.ListJobs(request, timeout=CALL_TIMEOUT_SECONDS))).jobs)

    async def watch(
        self, job_id: str, patience_seconds: float = PATIENCE_SECONDS
    ) -> AsyncGenerator[Job, None]:
        """The job now and after every change, the last one being the ended one.

        Args:
            patience_seconds: how long a trainer that has answered may be away, for example to be restarted.

        Raises:
            FusionRouteError: JOB_UNKNOWN; Unavailable when the trainer is not there, or stayed away.
        """
        heard_at, failures = -math.inf, 0
        while True:
            request = trainer_pb2.WatchJobRequest(job_id=job_id)
            call = self._trainer.WatchJob(request, timeout=STREAM_TIMEOUT_SECONDS)
            try:
                async with aclosing(answers_of(call, self.address)) as responses:
                    async for response in responses:
                        heard_at, failures = time.monotonic(), 0
                        yield response.job
                        if is_ended(response.job):
                            return
            except Unavailable:
                if time.monotonic() - heard_at > patience_seconds:
                    raise
            await asyncio.sleep(backoff_seconds(failures, most=2.0))
            failures += 1

    async def cancel(self, job_id: str, *, discard: bool = False) -> Job:
        """Asks a job to stop; a running one first saves its state unless `discard`. Raises JOB_STATE, JOB_UNKNOWN."""
        request = trainer_pb2.CancelJobRequest(job_id=job_id, discard=discard)
        return (await self._ask(self._trainer.CancelJob(request, timeout=CALL_TIMEOUT_SECONDS))).job

    async def resume(self, job_id: str) -> Job:
        """Queues a cancelled or failed job again. Raises JOB_STATE, JOB_UNKNOWN."""
        request = trainer_pb2.ResumeJobRequest(job_id=job_id)
        return (await self._ask(self._trainer.ResumeJob(request, timeout=CALL_TIMEOUT_SECONDS))).job

    async def read_log(
        self, job_id: str, from_offset: int = 0, *, follow: bool = False
    ) -> AsyncGenerator[ReadJobLogResponse, None]:
        """What a job has written, in pieces of bytes; with `follow` until it has ended."""
        request = trainer_pb2.ReadJobLogRequest(job_id=job_id, from_offset=from_offset, follow=follow)
        call = self._trainer.ReadJobLog(request, timeout=STREAM_TIMEOUT_SECONDS)
        async with aclosing(answers_of(call, self.address)) as responses:
            async for response in responses:
                yield response

    async def list_checkpoints(self, limit: int = 0) -> ListCheckpointsResponse:
        """The newest published checkpoints, newest first (0 = 100 of them), and the promotions' revision."""
        request = trainer_pb2.ListCheckpointsRequest(limit=limit)
        return await self._ask(self._trainer.ListCheckpoints(request, timeout=CALL_TIMEOUT_SECONDS))

    async def get_checkpoint(self, checkpoint_id: str) -> Checkpoint:
        """A published checkpoint. Raises CHECKPOINT_UNKNOWN."""
        request = trainer_pb2.GetCheckpointRequest(checkpoint_id=checkpoint_id)
        answer = await self._ask(self._trainer.GetCheckpoint(request, timeout=CALL_TIMEOUT_SECONDS))
        return answer.checkpoint

    async def promote(self, checkpoint_id: str, expected_revision: int) -> int:
        """Makes a checkpoint the one that routers serve. Returns the revision after it.

        Raises:
            FusionRouteError: CHECKPOINT_UNKNOWN; REVISION_CONFLICT; EXPERTS_MISMATCH, naming slot and fingerprints.
        """
        request = trainer_pb2.PromoteCheckpointRequest(
            checkpoint_id=checkpoint_id, expected_revision=expected_revision
        )
        call = self._trainer.PromoteCheckpoint(request, timeout=PROMOTION_TIMEOUT_SECONDS)
        return (await self._ask(call)).revision

    async def rollback(self, expected_revision: int) -> RollbackCheckpointResponse:
        """Makes the checkpoint before the promoted one the promoted one.

        Raises:
            FusionRouteError: NOTHING_TO_ROLL_BACK; REVISION_CONFLICT; EXPERTS_MISMATCH.
        """
        request = trainer_pb2.RollbackCheckpointRequest(expected_revision=expected_revision)
        return await self._ask(self._trainer.RollbackCheckpoint(request, timeout=PROMOTION_TIMEOUT_SECONDS))

    async def _ask(self, call: Awaitable[Answer]) -> Answer:
        return await answer_of(call, self.address)


def is_ended(job: Job) -> bool:
    """Whether nothing more happens to a job unless it is resumed."""
    return job.state in ENDED_STATES


def job_kind(name: str) -> JobKind.ValueType:
    """The contract's kind of "sft", "cdpo" ...; raises ValueError for any other word."""
    return JobKind.Value(f"JOB_KIND_{name.upper()}")


def kind_name(kind: JobKind.ValueType) -> str:
    """ "label", "sft", "cdpo", "pairs", "extend" or "unspecified"."""
    return JobKind.Name(kind).removeprefix("JOB_KIND_").lower()


def state_name(state: JobState.ValueType) -> str:
    """ "queued", "running", "succeeded", "failed", "cancelled" or "unspecified"."""
    return JobState.Name(state).removeprefix("JOB_STATE_").lower()
