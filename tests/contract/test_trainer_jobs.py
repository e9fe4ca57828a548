"""The calls about jobs over real gRPC, with a supervisor whose jobs are real processes of a fake run."""

from __future__ import annotations

import asyncio
import json
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, aclosing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
from pydantic import SecretStr
from redis.asyncio import Redis

from fusionroute.errors import FusionRouteError, Reason
from fusionroute.manifest import COMPLETE_FILE, MANIFEST_FILE, ExpertRecord, Manifest
from fusionroute.private_redis import PrivateRedis, connect
from fusionroute.trainer_client import TrainerClient, state_name
from fusionroute.v1.trainer_pb2 import Job, JobKind
from tests.expert_fakes import until
from tests.fake_job import NOTE, config_of, steps_done
from tests.fake_trainer import FAKE_JOB_COMMAND
from trainer.bootstrap import RunningTrainer, running_trainer
from trainer.config import JobKind as ConfiguredKind
from trainer.jobs.leftovers import processes_of
from trainer.settings import TrainerSettings

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


@pytest.fixture
async def serve(tmp_path: Path) -> AsyncIterator[Serve]:
    """Starts trainers with settings; they share a Redis that no other test knows."""
    async with AsyncExitStack() as stack:
        redis = await stack.enter_async_context(PrivateRedis())
        redis_client = connect(redis.url)
        stack.push_async_callback(redis_client.aclose)

        async def start(**changes: Any) -> Served:
            quick = {"job_heartbeat_seconds": 0.05, "job_lease_seconds": 5.0, "job_retry_seconds": 0.05}
            settings = TrainerSettings(
                port=0,
                redis_url=SecretStr(redis.url),
                jobs_dir=tmp_path / "jobs",
                checkpoints_dir=tmp_path / "checkpoints",
                **{**quick, **changes},
            )
            (tmp_path / "checkpoints").mkdir(exist_ok=True)
            trainer = await stack.enter_async_context(running_trainer(settings, FAKE_JOB_COMMAND))
            client = await stack.enter_async_context(TrainerClient.open(trainer.server.address))
            return Served(trainer, client, tmp_path, redis_client)

        yield start


async def reason_of(call: Any) -> FusionRouteError:
    with pytest.raises(FusionRouteError) as caught:
        await call
    return caught.value


async def test_a_job_runs_and_publishes_one_checkpoint(serve: Serve) -> None:
    served = await serve()
    job = await served.ended(await served.submit())
    assert (state_name(job.state), job.num_attempts) == ("succeeded", 1)
    assert job.checkpoint_id == f"good-sft-{job.job_id}"
    assert job.state_reason == f"published {job.checkpoint_id}"
    assert served.checkpoints == [job.checkpoint_id]
    assert (served.folder / "checkpoints" / job.checkpoint_id / "COMPLETE").exists()
    assert steps_done(served.job_folder(job)) == list(range(1, 11))
    assert (job.progress.stage, job.progress.step, job.progress.num_steps) == ("training", 10, 10)
    assert job.progress.note == NOTE, "told once at step 1, kept for whoever looks later"
    assert job.progress.loss == pytest.approx(0.1)
    assert job.submitted_at_seconds <= job.started_at_seconds <= job.ended_at_seconds
    assert job.folder == str(served.job_folder(job))


async def test_watching_tells_of_progress_before_the_end(serve: Serve) -> None:
    served = await serve()
    job = await served.submit(num_steps=MANY_STEPS)
    states, steps = [], set[int]()
    async with asyncio.timeout(SECONDS), aclosing(served.client.watch(job.job_id)) as jobs:
        async for latest in jobs:
            states.append(state_name(latest.state))
            steps.add(latest.progress.step)
            if len(steps) == 4:
                await served.client.cancel(job.job_id)
    assert states == sorted(states, key=["queued", "running", "cancelled"].index)
    assert states[-1] == "cancelled" and len(steps) >= 4


async def test_the_same_key_submits_once_and_another_configuration_is_refused(serve: Serve) -> None:
    served = await serve()
    first = await served.client.submit("sft", config_of(), "key")
    again = await served.client.submit("sft", config_of(), "key")
    assert (first.created, again.created, again.job.job_id) == (True, False, first.job.job_id)
    error = await reason_of(served.client.submit("sft", config_of("nan"), "key"))
    assert error.reason is Reason.KEY_REUSED
    assert first.job.job_id in error.message
    assert [job.job_id for job in await served.client.list_jobs()] == [first.job.job_id]


async def test_defaults_that_are_spelled_out_are_the_same_configuration(serve: Serve) -> None:
    served = await serve()
    short = '{"experts":{"math":"x"},"data":{"files":["x"]},"router":"x"}'
    first = await served.client.submit("sft", short, "key")
    again = await served.client.submit("sft", first.job.config, "key")
    assert not again.created


async def test_bad_configurations_kinds_and_keys_are_refused_by_name(serve: Serve) -> None:
    served = await serve()
    for config, named in (
        ("{", "not valid JSON"),
        ("{}", "experts is missing"),
        (config_of().replace('"max_steps":10', '"max_steps":0'), "training.max_steps = 0"),
        (config_of().replace('"name":"good"', '"name":"../good"'), "name = '../good'"),
    ):
        error = await reason_of(served.client.submit("sft", config, "key"))
        assert error.reason is Reason.INVALID_FIELD
        assert named in error.message
    error = await reason_of(served.client.submit("unspecified", config_of(), "key"))
    assert error.message.startswith("kind = 0")
    error = await reason_of(served.client.submit("sft", config_of(), ""))
    assert error.message.startswith("idempotency_key = ''")
    assert await served.client.list_jobs() == []


async def test_an_unknown_job_is_named(serve: Serve) -> None:
    served = await serve()
    for call in (served.client.get, served.client.cancel, served.client.resume):
        error = await reason_of(call("0123456789ab"))
        assert (error.reason, "0123456789ab" in error.message) == (Reason.JOB_UNKNOWN, True)
    with pytest.raises(FusionRouteError) as caught:
        async with aclosing(served.client.watch("0123456789ab")) as jobs:
            await anext(jobs)
    assert caught.value.reason is Reason.JOB_UNKNOWN


@pytest.mark.parametrize(
    ("name", "named"),
    [
        ("nan", "the loss of step 3 is nan (part: cdpo) (LOSS_NOT_FINITE)"),
        ("bug", "ZeroDivisionError: nobody has thought of this (INTERNAL)"),
        ("full", "No space left on device (STORAGE_FULL)"),
        ("half", "COMPLETE is missing (CHECKPOINT_INCOMPLETE)"),
    ],
)
async def test_a_run_that_fails_is_not_tried_again_and_publishes_nothing(
    serve: Serve, name: str, named: str
) -> None:
    served = await serve()
    job = await served.ended(await served.submit(name))
    assert (state_name(job.state), job.num_attempts, job.checkpoint_id) == ("failed", 1, "")
    assert named in job.state_reason
    assert served.checkpoints == []


async def test_a_process_that_dies_again_and_again_fails_the_job(serve: Serve) -> None:
    served = await serve()
    job = await served.ended(await served.submit("suicide"))
    assert (state_name(job.state), job.num_attempts) == ("failed", 3)
    assert job.state_reason == "the worker died 3 times, the last time: its process died with signal 9"
    assert served.checkpoints == []


async def test_a_job_that_makes_no_checkpoint_publishes_none(serve: Serve) -> None:
    served = await serve()
    job = await served.ended(await served.submit("labels"))
    assert (state_name(job.state), job.checkpoint_id) == ("succeeded", "")
    assert job.state_reason == f"made {served.job_folder(job) / 'artifact'}"
    assert served.checkpoints == []


async def test_a_killed_process_is_replaced_and_goes_on_from_the_last_state(serve: Serve) -> None:
    served = await serve()
    submitted = await served.submit("parent", num_steps=30)
    worker = await served.started(submitted, 8)
    worker.kill()
    job = await served.ended(submitted)
    assert (state_name(job.state), job.num_attempts) == ("succeeded", 2)
    steps = steps_done(served.job_folder(job))
    died_at = next(i for i in range(1, len(steps)) if steps[i] != steps[i - 1] + 1)
    assert steps[died_at] % 5 == 1 and steps[died_at] <= steps[died_at - 1] + 1
    assert (steps[-1], served.checkpoints) == (30, [job.checkpoint_id])
    assert processes_of(served.job_folder(job)) == []


async def test_cancelling_saves_and_resuming_goes_on_from_there(serve: Serve) -> None:
    served = await serve()
    submitted = await served.submit("parent", num_steps=60)
    await served.started(submitted, 7)
    assert state_name((await served.client.cancel(submitted.job_id)).state) == "running"
    cancelled = await served.ended(submitted)
    assert (state_name(cancelled.state), cancelled.state_reason) == ("cancelled", "on request")
    assert processes_of(served.job_folder(submitted)) == []
    done = steps_done(served.job_folder(submitted))
    assert state_name((await served.client.resume(submitted.job_id)).state) in ("queued", "running")
    job = await served.ended(submitted)
    assert (state_name(job.state), job.num_attempts) == ("succeeded", 2)
    assert done == list(range(1, len(done) + 1)) and len(done) < 60
    assert steps_done(served.job_folder(job)) == list(range(1, 61)), "no step was lost or made twice"
    assert served.checkpoints == [job.checkpoint_id]


async def test_cancelling_with_discard_loses_the_unsaved_steps(serve: Serve) -> None:
    served = await serve()
    submitted = await served.submit(num_steps=60)
    await served.started(submitted, 7)
    await served.client.cancel(submitted.job_id, discard=True)
    await served.ended(submitted)
    last = steps_done(served.job_folder(submitted))[-1]
    await served.client.resume(submitted.job_id)
    await served.ended(submitted)
    steps = steps_done(served.job_folder(submitted))
    assert steps.index(last // 5 * 5 + 1, last) == last, "it went on from the last state, a multiple of 5"
    assert steps[-1] == 60


async def test_a_run_that_does_not_listen_is_killed_when_it_is_cancelled(serve: Serve) -> None:
    served = await serve(job_stop_seconds=0.3)
    submitted = await served.submit("stubborn", MANY_STEPS)
    await served.started(submitted)
    await served.client.cancel(submitted.job_id)
    job = await served.ended(submitted)
    assert state_name(job.state) == "cancelled"
    assert "signal 9" in job.state_reason
    assert processes_of(served.job_folder(submitted)) == []


async def test_one_job_runs_at_a_time_and_a_waiting_one_is_cancelled_at_once(serve: Serve) -> None:
    served = await serve()
    running, waiting = await served.submit(num_steps=MANY_STEPS), await served.submit()
    await served.started(running)
    assert state_name((await served.client.get(waiting.job_id)).state) == "queued"
    assert state_name((await served.client.cancel(waiting.job_id)).state) == "cancelled"
    await served.client.cancel(running.job_id)
    assert state_name((await served.ended(running)).state) == "cancelled"
    assert not served.job_folder(waiting).exists()


async def test_two_jobs_run_at_a_time_where_that_is_allowed(serve: Serve) -> None:
    served = await serve(max_running_jobs=2)
    jobs = [await served.submit(num_steps=MANY_STEPS) for _ in range(2)]
    await asyncio.gather(*(served.started(job) for job in jobs))
    assert served.trainer.supervisor.num_running == 2
    for job in jobs:
        await served.client.cancel(job.job_id)
    assert [state_name((await served.ended(job)).state) for job in jobs] == ["cancelled"] * 2


async def test_jobs_in_the_wrong_state_are_refused_by_name(serve: Serve) -> None:
    served = await serve()
    done = await served.ended(await served.submit())
    for call in (served.client.cancel, served.client.resume):
        error = await reason_of(call(done.job_id))
        assert (error.reason, "is succeeded" in error.message) == (Reason.JOB_STATE, True)


async def test_a_drained_trainer_gives_its_jobs_back_saved(serve: Serve) -> None:
    served = await serve()
    submitted = await served.submit(num_steps=60)
    await served.started(submitted, 7)
    async with asyncio.timeout(SECONDS):
        await served.trainer.supervisor.drain(10.0)
    job = await served.client.get(submitted.job_id)
    assert (state_name(job.state), job.state_reason) == ("queued", "its trainer was stopped")
    assert processes_of(served.job_folder(submitted)) == []
    successor = await serve()
    job = await successor.ended(submitted)
    assert (state_name(job.state), job.num_attempts) == ("succeeded", 2)
    assert steps_done(served.job_folder(job)) == list(range(1, 61))


async def test_a_stopping_trainer_kills_what_does_not_listen(serve: Serve) -> None:
    served = await serve()
    submitted = await served.submit("stubborn", MANY_STEPS)
    await served.started(submitted)
    async with asyncio.timeout(SECONDS):
        await served.trainer.supervisor.drain(0.5)
    assert state_name((await served.client.get(submitted.job_id)).state) == "queued"
    assert processes_of(served.job_folder(submitted)) == []


async def test_a_trainer_that_was_overtaken_stops_its_process_and_publishes_nothing(serve: Serve) -> None:
    served = await serve()
    submitted = await served.submit("stubborn", MANY_STEPS)
    worker = await served.started(submitted)
    await served.tamper(submitted, "HINCRBY", "fence", 1)
    await until(lambda: not worker.is_running(), SECONDS)
    await until(lambda: served.trainer.supervisor.num_running == 0, SECONDS)
    assert served.checkpoints == []
    assert state_name((await served.client.get(submitted.job_id)).state) == "running"


async def test_the_log_is_read_from_any_offset_and_followed_to_the_end(serve: Serve) -> None:
    served = await serve()
    job = await served.submit(num_steps=20)
    followed = b""
    async with asyncio.timeout(SECONDS), aclosing(served.client.read_log(job.job_id, follow=True)) as pieces:
        async for piece in pieces:
            followed += piece.text
            assert piece.next_offset == len(followed)
    assert b"step 1\n" in followed and b"step 20\n" in followed
    rest = b"".join([piece.text async for piece in served.client.read_log(job.job_id, 7)])
    assert rest == followed[7:]
    assert [piece async for piece in served.client.read_log(job.job_id, 10**9)] == []


async def test_a_commitment_that_was_not_carried_out_is_carried_out_by_the_next(serve: Serve) -> None:
    """The trainer was killed between its promise and the move of the folder, or between that and the last word."""
    served = await serve()
    job = await served.ended(await served.submit(num_steps=12))
    target = served.folder / "checkpoints" / job.checkpoint_id
    for is_moved in (False, True):
        if not is_moved:
            target.rename(served.job_folder(job) / "artifact")
        # As the store would have it: committed, running, and nobody there.
        await served.tamper(job, "HSET", "state", "running")
        await served.redis.zadd("fr:job:{default}:open", {job.job_id: 0})
        again = await served.ended(job)
        assert (state_name(again.state), again.checkpoint_id) == ("succeeded", job.checkpoint_id)
        assert served.checkpoints == [job.checkpoint_id]
    assert steps_done(served.job_folder(job)) == list(range(1, 13)), "nothing was computed again"


async def test_a_checkpoint_that_cannot_be_published_fails_the_job_and_is_published_by_resuming(
    serve: Serve,
) -> None:
    served = await serve()
    (served.folder / "checkpoints").rmdir()
    (served.folder / "checkpoints").touch()  # a file where a folder must be
    job = await served.ended(await served.submit(num_steps=12))
    assert (state_name(job.state), job.checkpoint_id, job.num_attempts) == ("failed", "", 1)
    assert "cannot be published" in job.state_reason and "resume the job" in job.state_reason
    (served.folder / "checkpoints").unlink()
    await served.client.resume(job.job_id)
    job = await served.ended(job)
    assert (state_name(job.state), served.checkpoints) == ("succeeded", [job.checkpoint_id])
    assert steps_done(served.job_folder(job)) == list(range(1, 13)), "nothing was computed again"


def test_every_kind_of_the_configuration_is_one_of_the_contract() -> None:
    names = {kind.name for kind in ConfiguredKind}
    assert {f"JOB_KIND_{name}" for name in names} == set(JobKind.keys()) - {"JOB_KIND_UNSPECIFIED"}


async def test_a_job_may_start_from_a_published_checkpoint_by_its_id(serve: Serve) -> None:
    served = await serve()
    folder = served.folder / "checkpoints" / "first-sft-1"
    folder.mkdir()
    expert = ExpertRecord("math", "m", "t", 9, "w")
    (folder / MANIFEST_FILE).write_text(Manifest((expert,), "sum", "t", 9).to_json())
    (folder / COMPLETE_FILE).touch()
    config = json.loads(config_of("second", 5)) | {"router": "checkpoint:first-sft-1"}
    job = (await served.client.submit("sft", json.dumps(config), uuid.uuid4().hex)).job
    assert json.loads(job.config)["router"] == str(folder)


async def test_a_job_from_an_unknown_checkpoint_is_refused_before_it_is_queued(serve: Serve) -> None:
    served = await serve()
    config = json.loads(config_of("second", 5)) | {"router": "checkpoint:never-made"}
    with pytest.raises(FusionRouteError, match="never-made") as error:
        await served.client.submit("sft", json.dumps(config), uuid.uuid4().hex)
    assert error.value.reason is Reason.CHECKPOINT_UNKNOWN
    assert not await served.client.list_jobs()
