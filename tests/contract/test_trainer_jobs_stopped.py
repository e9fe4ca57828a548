"""Jobs that are cancelled, killed, drained or overtaken, over real gRPC, with real processes of a fake run."""

from __future__ import annotations

import asyncio

from fusionroute.errors import Reason
from fusionroute.trainer_client import state_name
from tests.expert_fakes import until
from tests.fake_job import steps_done
from tests.served_trainer import MANY_STEPS, SECONDS, Serve, reason_of
from trainer.jobs.leftovers import processes_of


async def test_a_process_that_dies_again_and_again_fails_the_job(serve: Serve) -> None:
    served = await serve()
    job = await served.ended(await served.submit("suicide"))
    assert (state_name(job.state), job.num_attempts) == ("failed", 3)
    assert job.state_reason == "the worker died 3 times, the last time: its process died with signal 9"
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
