"""A trainer that serves, for tests: its client, its files, and its jobs as processes."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
from redis.asyncio import Redis

from fusionroute.errors import FusionRouteError
from fusionroute.trainer_client import TrainerClient
from fusionroute.v1.trainer_pb2 import Job
from tests.expert_fakes import until
from tests.fake_job import config_of, steps_done
from trainer.bootstrap import RunningTrainer
from trainer.jobs.leftovers import processes_of

MANY_STEPS = 100_000
SECONDS = 40.0


@dataclass
class Served:
    """A trainer that serves, a client of it, and where its files lie."""

    trainer: RunningTrainer
    client: TrainerClient
    folder: Path
    redis: Redis

    @property
    def checkpoints(self) -> list[str]:
        return sorted(path.name for path in (self.folder / "checkpoints").iterdir())

    def job_folder(self, job: Job) -> Path:
        return self.folder / "jobs" / job.job_id

    async def submit(self, name: str = "good", num_steps: int = 10) -> Job:
        key = uuid.uuid4().hex
        return (await self.client.submit("sft", config_of(name, num_steps), key)).job

    async def tamper(self, job: Job, command: str, *arguments: str | int) -> None:
        """Changes what the store has of a job."""
        execute: Any = self.redis.execute_command
        await execute(command, f"fr:job:{{default}}:job:{job.job_id}", *arguments)

    async def ended(self, job: Job) -> Job:
        async with asyncio.timeout(SECONDS), aclosing(self.client.watch(job.job_id)) as jobs:
            async for latest in jobs:
                job = latest
        return job

    async def started(self, job: Job, step: int = 3) -> psutil.Process:
        """The process of a job that has made so many steps."""
        await until(lambda: len(steps_done(self.job_folder(job))) >= step, SECONDS)
        return next(p for p in processes_of(self.job_folder(job)) if "tests.fake_job" in p.cmdline())


Serve = Callable[..., Awaitable[Served]]


async def reason_of(call: Any) -> FusionRouteError:
    with pytest.raises(FusionRouteError) as caught:
        await call
    return caught.value
