"""Killing the job, the trainer and Redis in the middle of a job: it ends once, with one checkpoint and no orphan."""

from __future__ import annotations

import asyncio
import random
import shutil
import signal
import sys
import tempfile
import uuid
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, aclosing, asynccontextmanager, contextmanager, suppress
from itertools import pairwise
from pathlib import Path

import psutil
import pytest

from fusionroute.errors import Unavailable
from fusionroute.private_redis import check, connect, find_redis_server
from fusionroute.trainer_client import TrainerClient, state_name
from fusionroute.v1.trainer_pb2 import Job
from tests.daemons import Daemon
from tests.expert_fakes import until
from tests.fake_job import config_of, steps_done
from trainer.jobs.leftovers import processes_of

SECONDS = 60.0
LEASE_SECONDS = 1.0


class KillableRedis:
    """A Redis that keeps its data and has the same address each time it is started."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._process: asyncio.subprocess.Process | None = None
        self.url = f"unix://{folder}/redis.sock"

    async def start(self) -> None:
        self._process = await asyncio.create_subprocess_exec(
            str(find_redis_server()), "--port", "0", "--unixsocket", f"{self._folder}/redis.sock",
            "--dir", str(self._folder), "--appendonly", "yes", "--save", "",
            stdout=asyncio.subprocess.DEVNULL,
        )  # fmt: skip
        client = connect(self.url)
        async with asyncio.timeout(SECONDS):
            while True:
                with suppress(Unavailable):
                    await check(client)
                    break
                await asyncio.sleep(0.05)
        await client.aclose()

    async def kill(self) -> None:
        assert self._process is not None
        with suppress(ProcessLookupError):
            self._process.kill()
        await self._process.wait()


class Scene:
    """A Redis, and trainers as the programs they are, on one folder."""

    def __init__(self, folder: Path, redis: KillableRedis) -> None:
        self.folder = folder
        self.redis = redis
        self._stack = AsyncExitStack()
        self._num_started = 0

    async def start_trainer(self, *options: str) -> Daemon:
        self._num_started += 1
        ready_file = self.folder / f"ready-{self._num_started}"
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "tests.fake_trainer", "--port", "0", "--log-format", "json",
            "--ready-file", str(ready_file), "--redis-url", self.redis.url,
            "--jobs-dir", str(self.folder / "jobs"), "--checkpoints-dir", str(self.folder / "checkpoints"),
            "--job-lease-seconds", str(LEASE_SECONDS), "--job-heartbeat-seconds", "0.1",
            "--job-retry-seconds", "0.05", "--job-stop-seconds", "5", *options,
            stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.PIPE,
        )  # fmt: skip
        self._stack.push_async_callback(end, process)
        return Daemon(process, ready_file)

    async def close(self) -> None:
        await self._stack.aclose()

    def folder_of(self, job: Job) -> Path:
        return self.folder / "jobs" / job.job_id

    @property
    def checkpoints(self) -> list[str]:
        return sorted(path.name for path in (self.folder / "checkpoints").iterdir())

    def worker(self, job: Job) -> psutil.Process | None:
        """The job's process, if it runs."""
        for process in processes_of(self.folder_of(job)):
            with suppress(psutil.Error):
                if "tests.fake_job" in process.cmdline():
                    return process
        return None

    @contextmanager
    def at_rest(self, job: Job) -> Iterator[None]:
        """The job makes no steps within the context, however long that takes."""
        worker = self.worker(job)
        assert worker is not None
        worker.suspend()
        try:
            yield
        finally:
            worker.resume()

    async def made_steps(self, job: Job, num_steps: int) -> None:
        await until(lambda: len(steps_done(self.folder_of(job))) >= num_steps, SECONDS)

    async def nothing_runs(self, job: Job) -> None:
        await until(lambda: processes_of(self.folder_of(job)) == [], SECONDS)

    async def ended(self, trainer: Daemon, job: Job) -> Job:
        async with (
            asyncio.timeout(SECONDS),
            TrainerClient.open(await trainer.address()) as client,
            aclosing(client.watch(job.job_id)) as jobs,
        ):
            async for latest in jobs:
                job = latest
        return job

    async def succeeded_once(self, trainer: Daemon, job: Job, num_steps: int) -> Job:
        """Waits for the end and checks all that must hold however often somebody was killed."""
        job = await self.ended(trainer, job)
        assert state_name(job.state) == "succeeded", job.state_reason
        assert self.checkpoints == [job.checkpoint_id]
        assert (self.folder / "checkpoints" / job.checkpoint_id / "COMPLETE").exists()
        await self.nothing_runs(job)
        steps = steps_done(self.folder_of(job))
        assert set(steps) == set(range(1, num_steps + 1))
        for before, after in pairwise(steps):
            assert after == before + 1 or (after % 5 == 1 and after <= before + 1), "it went on from a state"
        return job


async def end(process: asyncio.subprocess.Process) -> None:
    if process.returncode is None:
        process.kill()
        await process.communicate()


async def killed(daemon: Daemon) -> None:
    with suppress(ProcessLookupError):
        daemon.process.kill()
    await daemon.process.communicate()


async def submitted(trainer: Daemon, name: str = "good", num_steps: int = 100) -> Job:
    async with TrainerClient.open(await trainer.address()) as client:
        return (await client.submit("sft", config_of(name, num_steps), uuid.uuid4().hex)).job


@pytest.fixture
async def scene(tmp_path: Path) -> AsyncIterator[Scene]:
    @asynccontextmanager
    async def running() -> AsyncIterator[Scene]:
        data = Path(tempfile.mkdtemp(prefix="fr-"))  # the path of a socket must be short
        redis = KillableRedis(data)
        made = Scene(tmp_path, redis)
        try:
            await redis.start()
            yield made
        finally:
            await made.close()
            await redis.kill()
            shutil.rmtree(data)

    async with running() as made:
        yield made


async def test_a_killed_trainer_leaves_no_process_and_its_successor_finishes_the_job(scene: Scene) -> None:
    trainer = await scene.start_trainer()
    job = await submitted(trainer, "parent")
    await scene.made_steps(job, 13)
    await killed(trainer)
    await scene.nothing_runs(job)
    left_at = steps_done(scene.folder_of(job))[-1]
    job = await scene.succeeded_once(await scene.start_trainer(), job, 100)
    assert job.num_attempts == 2
    steps = steps_done(scene.folder_of(job))
    assert steps == list(range(1, 101)), f"left alone at {left_at} it saved before it ended"


async def test_a_process_that_does_not_listen_does_not_outlive_its_trainer_for_long(scene: Scene) -> None:
    trainer = await scene.start_trainer("--job-stop-seconds", "0.3")
    job = await submitted(trainer, "stubborn", 100_000)
    await scene.made_steps(job, 3)
    await killed(trainer)
    await scene.nothing_runs(job)


async def test_trainer_and_job_killed_together_cost_the_unsaved_steps_only(scene: Scene) -> None:
    trainer = await scene.start_trainer()
    job = await submitted(trainer)
    await scene.made_steps(job, 13)
    worker = scene.worker(job)
    assert worker is not None
    worker.suspend()  # so that it cannot save
    await killed(trainer)
    worker.kill()
    job = await scene.succeeded_once(await scene.start_trainer(), job, 100)
    assert job.num_attempts == 2


async def test_a_run_goes_on_while_redis_is_away_for_longer_than_a_lease(scene: Scene) -> None:
    trainer = await scene.start_trainer()
    job = await submitted(trainer, num_steps=200)
    await scene.made_steps(job, 5)
    await scene.redis.kill()
    before = len(steps_done(scene.folder_of(job)))
    await asyncio.sleep(1.5 * LEASE_SECONDS)
    assert len(steps_done(scene.folder_of(job))) > before + 10
    await scene.redis.start()
    job = await scene.succeeded_once(trainer, job, 200)
    assert job.num_attempts == 1
    assert steps_done(scene.folder_of(job)) == list(range(1, 201))


async def test_a_job_that_ends_while_redis_is_away_is_published_when_it_is_back(scene: Scene) -> None:
    trainer = await scene.start_trainer()
    job = await submitted(trainer, num_steps=30)
    await scene.made_steps(job, 5)
    await scene.redis.kill()
    await scene.made_steps(job, 30)
    await scene.nothing_runs(job)
    await asyncio.sleep(5.5)  # longer than a single operation of the store is repeated
    assert scene.checkpoints == [], "nothing is published without the store's word"
    await scene.redis.start()
    job = await scene.succeeded_once(trainer, job, 30)
    assert job.num_attempts == 1


async def test_a_stopped_trainer_saves_its_job_and_the_next_goes_on_at_once(scene: Scene) -> None:
    trainer = await scene.start_trainer()
    job = await submitted(trainer, "parent")
    await scene.made_steps(job, 13)
    trainer.process.send_signal(signal.SIGTERM)
    output = await trainer.process.communicate()
    assert trainer.process.returncode == 0, output
    await scene.nothing_runs(job)
    job = await scene.succeeded_once(await scene.start_trainer(), job, 100)
    assert job.num_attempts == 2
    assert steps_done(scene.folder_of(job)) == list(range(1, 101))


async def test_another_trainer_takes_over_from_a_killed_one(scene: Scene) -> None:
    first = await scene.start_trainer()
    job = await submitted(first)
    await scene.made_steps(job, 3)
    with scene.at_rest(job):
        second = await scene.start_trainer()
        await second.address()
    await killed(first)
    job = await scene.succeeded_once(second, job, 100)
    assert job.num_attempts == 2


async def test_a_trainer_that_was_frozen_and_replaced_publishes_nothing_when_it_wakes(scene: Scene) -> None:
    frozen = await scene.start_trainer()
    job = await submitted(frozen)
    await scene.made_steps(job, 3)
    with scene.at_rest(job):
        second = await scene.start_trainer()
        await second.address()
    frozen.process.send_signal(signal.SIGSTOP)
    job = await scene.succeeded_once(second, job, 100)
    assert job.num_attempts == 2
    checkpoint = scene.folder / "checkpoints" / job.checkpoint_id
    published_at = checkpoint.stat().st_mtime_ns
    frozen.process.send_signal(signal.SIGCONT)
    await asyncio.sleep(0.5)
    later = await scene.ended(frozen, job)
    assert later == job
    assert (scene.checkpoints, checkpoint.stat().st_mtime_ns) == ([job.checkpoint_id], published_at)


async def test_what_a_killed_process_has_started_is_ended_also_when_the_job_is_not_tried_again(
    scene: Scene,
) -> None:
    trainer = await scene.start_trainer()
    job = await submitted(trainer, "parent", 100_000)
    await scene.made_steps(job, 3)
    async with TrainerClient.open(await trainer.address()) as client:
        worker = scene.worker(job)
        assert worker is not None
        worker.suspend()  # so that it neither hears nor ends its children
        await client.cancel(job.job_id)
        await killed(trainer)
        worker.kill()
    await until(lambda: len(processes_of(scene.folder_of(job))) == 1, SECONDS)
    job = await scene.ended(await scene.start_trainer(), job)
    assert (state_name(job.state), job.num_attempts) == ("cancelled", 1)
    await scene.nothing_runs(job)


@pytest.mark.parametrize("seed", [1, 2])
async def test_whoever_is_killed_whenever_the_job_ends_once(scene: Scene, seed: int) -> None:
    choose = random.Random(seed)
    trainer = await scene.start_trainer("--job-max-deaths", "100")
    job = await submitted(trainer, "parent", 150)
    for _ in range(5):
        await asyncio.sleep(choose.uniform(0.1, 0.8))
        victim = choose.choice(["job", "trainer", "redis"])
        if victim == "job" and (worker := scene.worker(job)) is not None:
            with suppress(psutil.NoSuchProcess):
                worker.kill()
        elif victim == "redis":
            await scene.redis.kill()
            await asyncio.sleep(choose.uniform(0.0, 0.5))
            await scene.redis.start()
        elif victim == "trainer":
            await killed(trainer)
        if trainer.process.returncode is not None:  # killed, or it began when Redis was away
            trainer = await scene.start_trainer("--job-max-deaths", "100")
    await until(lambda: trainer.ready_file.exists() or trainer.process.returncode is not None, SECONDS)
    if trainer.process.returncode is not None:
        trainer = await scene.start_trainer("--job-max-deaths", "100")
    await scene.succeeded_once(trainer, job, 150)
