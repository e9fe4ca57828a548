"""A trainer that serves jobs and checkpoints but works on none: what is queued stays queued."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from google.protobuf.message import Message

from fusionroute.grpc_runtime import server
from fusionroute.manifest import COMPLETE_FILE, MANIFEST_FILE, ExpertRecord, Manifest
from fusionroute.private_redis import PrivateRedis, connect
from fusionroute.promotions import PromotionStore
from fusionroute.trainer_client import TrainerClient
from fusionroute.v1 import trainer_pb2
from fusionroute.v1.registry_pb2 import ExpertEntry
from tests.fake_job import config_of
from trainer.bootstrap import trainer_service
from trainer.checkpoint_store import CheckpointStore
from trainer.jobs.folder import LOG_FILE
from trainer.jobs.records import Claim
from trainer.jobs.store import JobStore
from trainer.servicer import TrainerServicer

SERVICE = trainer_pb2.DESCRIPTOR.services_by_name["TrainerService"]
PUBLISHED = "first-sft-1"
WATCHED_KEY, NORMAL_KEY, LOGGED_KEY = "a-job-that-is-watched", "a-normal-job", "a-job-with-a-log"


@dataclass(frozen=True, slots=True)
class ServedTrainer:
    """A trainer without workers."""

    address: str
    client: TrainerClient
    job_id: str
    """Of a job that waits; a fuzzed call may cancel it."""
    logged_job_id: str
    """Of a job that a worker has taken, has printed, and has never been heard of since."""

    async def answer(self) -> tuple[str, str, str]:
        """What a caller who does nothing wrong is told: about a job of its own, and about a checkpoint."""
        job = (await self.client.submit("sft", config_of("normal"), NORMAL_KEY)).job
        checkpoint = await self.client.get_checkpoint(PUBLISHED)
        return job.job_id, job.config, checkpoint.manifest

    def valid_requests(self) -> dict[str, Message]:
        """By method."""
        job_id, sft = self.job_id, trainer_pb2.JobKind.JOB_KIND_SFT
        config = json.dumps(json.loads(config_of()) | {"router": f"checkpoint:{PUBLISHED}"})
        return {
            "SubmitJob": trainer_pb2.SubmitJobRequest(kind=sft, config=config, idempotency_key=WATCHED_KEY),
            "GetJob": trainer_pb2.GetJobRequest(job_id=job_id),
            "WatchJob": trainer_pb2.WatchJobRequest(job_id=job_id),
            "CancelJob": trainer_pb2.CancelJobRequest(job_id=job_id),
            "ResumeJob": trainer_pb2.ResumeJobRequest(job_id=job_id),
            "ReadJobLog": trainer_pb2.ReadJobLogRequest(job_id=self.logged_job_id),
            "GetCheckpoint": trainer_pb2.GetCheckpointRequest(checkpoint_id=PUBLISHED),
            "PromoteCheckpoint": trainer_pb2.PromoteCheckpointRequest(checkpoint_id=PUBLISHED),
        }


async def _nobody_serves() -> Sequence[ExpertEntry]:
    """No promotion gets so far as to load a model."""
    return ()


def _publish(folder: Path) -> None:
    """A complete checkpoint, as far as can be seen without its weights."""
    folder.mkdir(parents=True)
    manifest = Manifest((ExpertRecord("math", "m", "t", 9, "w"),), "sum", "t", 9)
    (folder / MANIFEST_FILE).write_text(manifest.to_json())
    (folder / COMPLETE_FILE).touch()


async def _logged_job(jobs: JobStore, client: TrainerClient, folder: Path) -> str:
    """A job with a log, taken by nobody that works."""
    job_id = (await client.submit("sft", config_of(), LOGGED_KEY)).job.job_id
    claim = await jobs.claim_any(folder)
    assert isinstance(claim, Claim) and claim.job.job_id == job_id
    (folder / job_id).mkdir(parents=True)
    (folder / job_id / LOG_FILE).write_text("step\n" * 100_000)
    return job_id


@asynccontextmanager
async def served_trainer(folder: Path) -> AsyncIterator[ServedTrainer]:
    """Serves over gRPC and a Redis of its own within the context; nothing takes the jobs."""
    _publish(folder / PUBLISHED)
    with PrivateRedis() as redis:
        store = connect(redis.url)
        jobs = JobStore(store)
        servicer = TrainerServicer(jobs, CheckpointStore(folder), PromotionStore(store), _nobody_serves)
        async with (
            server([trainer_service(servicer)]) as running,
            TrainerClient.open(running.address) as client,
        ):
            logged = await _logged_job(jobs, client, folder.parent / "jobs")
            job = (await client.submit("sft", config_of(), WATCHED_KEY)).job
            yield ServedTrainer(running.address, client, job.job_id, logged)
        await store.aclose()
