"""The calls about jobs over real gRPC, with a supervisor whose jobs are real processes of a fake run."""

from __future__ import annotations

import asyncio
import json
import uuid
from contextlib import aclosing

import pytest

from fusionroute.errors import FusionRouteError, Reason
from fusionroute.manifest import COMPLETE_FILE, MANIFEST_FILE, ExpertRecord, Manifest
from fusionroute.trainer_client import state_name
from fusionroute.v1.trainer_pb2 import JobKind
from tests.fake_job import NOTE, config_of, steps_done
from tests.served_trainer import MANY_STEPS, SECONDS, Serve, reason_of
from trainer.config import JobKind as ConfiguredKind


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
    remote = '{"data": {"files": ["x"]}, "output": "y.jsonl", "remote": {"url": "http://127.0.0.1:1"}}'
    error = await reason_of(served.client.submit("pairs", remote, "key"))
    assert error.message == "remote.url = 'http://127.0.0.1:1' is not allowed: for local runs only"
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


async def test_a_job_that_makes_no_checkpoint_publishes_none(serve: Serve) -> None:
    served = await serve()
    job = await served.ended(await served.submit("labels"))
    assert (state_name(job.state), job.checkpoint_id) == ("succeeded", "")
    assert job.state_reason == f"made {served.job_folder(job) / 'artifact'}"
    assert served.checkpoints == []


async def test_two_jobs_run_at_a_time_where_that_is_allowed(serve: Serve) -> None:
    served = await serve(max_running_jobs=2)
    jobs = [await served.submit(num_steps=MANY_STEPS) for _ in range(2)]
    await asyncio.gather(*(served.started(job) for job in jobs))
    assert served.trainer.supervisor.num_running == 2
    for job in jobs:
        await served.client.cancel(job.job_id)
    assert [state_name((await served.ended(job)).state) for job in jobs] == ["cancelled"] * 2


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
