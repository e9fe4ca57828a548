"""The job store on a real Redis: who may do what to a job, and that every word may be repeated."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator
from contextlib import aclosing
from pathlib import Path

import pytest
from redis.asyncio import Redis

from fusionroute.errors import FusionRouteError, Reason
from fusionroute.private_redis import PrivateRedis, connect
from fusionroute.redis_scripts import ScriptRunner
from trainer.config import JobKind
from trainer.jobs.records import Cancellation, Claim, Job, JobState, Lease
from trainer.jobs.store import JobStore, job_id_of
from trainer.run_context import RunProgress

CONFIG = '{"name":"run"}'
JOBS_DIR = Path("jobs")
SHORT_LEASE_SECONDS = 0.15


def new_store(client: Redis, **changes: float) -> JobStore:
    return JobStore(client, namespace=uuid.uuid4().hex, **changes)


@pytest.fixture
async def store(redis_client: Redis) -> AsyncIterator[JobStore]:
    yield new_store(redis_client)


@pytest.fixture
async def hasty(redis_client: Redis) -> AsyncIterator[JobStore]:
    """A store whose leases end soon."""
    yield new_store(redis_client, lease_seconds=SHORT_LEASE_SECONDS)


async def claimed(store: JobStore, key: str = "key") -> Claim:
    await store.submit(JobKind.SFT, CONFIG, key)
    return await claimed_again(store)


async def claimed_again(store: JobStore) -> Claim:
    claim = await store.claim_any(JOBS_DIR)
    assert isinstance(claim, Claim)
    return claim


async def lease_ends() -> None:
    await asyncio.sleep(SHORT_LEASE_SECONDS + 0.05)


async def reason_of(refused) -> Reason:
    with pytest.raises(FusionRouteError) as caught:
        await refused
    return caught.value.reason


async def test_a_submitted_job_waits_and_is_listed_newest_first(store: JobStore) -> None:
    first = await store.submit(JobKind.SFT, CONFIG, "first")
    await asyncio.sleep(0.005)
    second = await store.submit(JobKind.LABEL, CONFIG, "second")
    assert first.created and second.created
    assert (first.job.state, first.job.num_attempts, first.job.config) == (JobState.QUEUED, 0, CONFIG)
    assert [job.job_id for job in await store.list_jobs(10)] == [second.job.job_id, first.job.job_id]
    assert [job.kind for job in await store.list_jobs(1)] == [JobKind.LABEL]
    assert await store.get(first.job.job_id) == first.job


async def test_the_same_key_returns_the_job_it_made_and_makes_no_second(store: JobStore) -> None:
    first = await store.submit(JobKind.SFT, CONFIG, "key")
    again = await store.submit(JobKind.SFT, CONFIG, "key")
    assert (again.created, again.job.job_id) == (False, first.job.job_id)
    assert len(await store.list_jobs(10)) == 1


async def test_the_same_key_for_another_configuration_is_refused(store: JobStore) -> None:
    await store.submit(JobKind.SFT, CONFIG, "key")
    assert await reason_of(store.submit(JobKind.SFT, '{"name":"other"}', "key")) is Reason.KEY_REUSED
    assert await reason_of(store.submit(JobKind.LABEL, CONFIG, "key")) is Reason.KEY_REUSED


@pytest.mark.parametrize("key", ["", "x" * 129])
async def test_an_empty_or_long_key_is_refused(store: JobStore, key: str) -> None:
    assert await reason_of(store.submit(JobKind.SFT, CONFIG, key)) is Reason.INVALID_FIELD


@pytest.mark.parametrize("job_id", ["0123456789ab", "no", "../../etc", "0" * 200])
async def test_an_unknown_job_is_named(store: JobStore, job_id: str) -> None:
    assert await reason_of(store.get(job_id)) is Reason.JOB_UNKNOWN
    assert await reason_of(store.cancel(job_id, Cancellation.SAVE)) is Reason.JOB_UNKNOWN
    assert await reason_of(store.resume(job_id)) is Reason.JOB_UNKNOWN


async def test_a_job_is_claimed_by_one_worker_only(store: JobStore) -> None:
    for number in range(5):
        await store.submit(JobKind.SFT, CONFIG, f"key {number}")
    claims = await asyncio.gather(*(store.claim_any(JOBS_DIR) for _ in range(12)))
    ids = [claim.job.job_id for claim in claims if isinstance(claim, Claim)]
    assert sorted(ids) == sorted(job_id_of(f"key {number}") for number in range(5))
    assert await store.claim_any(JOBS_DIR) is None


async def test_who_has_waited_longest_is_claimed_first(store: JobStore) -> None:
    for key in ("a", "b", "c"):
        await store.submit(JobKind.SFT, CONFIG, key)
        await asyncio.sleep(0.005)
    order = [await claimed_again(store) for _ in range(3)]
    assert [claim.job.job_id for claim in order] == [job_id_of(key) for key in ("a", "b", "c")]


async def test_a_claimed_job_runs_has_a_folder_and_a_higher_fence_each_time(store: JobStore) -> None:
    first = await claimed(store)
    assert first.job.state is JobState.RUNNING
    assert (first.job.num_attempts, first.job.folder) == (1, str(JOBS_DIR / first.job.job_id))
    assert first.job.started_at_seconds is not None
    assert await store.release(first.lease, "for the test") is JobState.QUEUED
    second = await claimed_again(store)
    assert second.lease.fence == first.lease.fence + 1
    assert second.job.num_attempts == 2


async def test_a_silent_worker_is_replaced_and_its_later_words_are_refused(hasty: JobStore) -> None:
    old = await claimed(hasty)
    assert await hasty.claim_any(JOBS_DIR) is None
    await lease_ends()
    new = await claimed_again(hasty)
    assert new.job.num_deaths == 1
    words = [
        hasty.heartbeat(old.lease, RunProgress("training", 9, 10)),
        hasty.commit(old.lease, "checkpoint"),
        hasty.finish(old.lease, JobState.SUCCEEDED, ""),
        hasty.release(old.lease, ""),
    ]
    for refused in words:
        assert await reason_of(refused) is Reason.STALE_FENCE
    job = await hasty.get(old.job.job_id)
    assert (job.state, job.progress, job.checkpoint_id) == (JobState.RUNNING, None, "")


async def test_a_lease_that_ran_out_is_renewed_while_nobody_else_has_taken_it(hasty: JobStore) -> None:
    claim = await claimed(hasty)
    await lease_ends()
    assert await hasty.heartbeat(claim.lease) is None
    assert await hasty.claim_any(JOBS_DIR) is None
    assert (await hasty.get(claim.job.job_id)).num_deaths == 0


async def test_a_worker_does_not_claim_what_it_is_working_on(hasty: JobStore) -> None:
    claim = await claimed(hasty)
    await lease_ends()
    assert await hasty.claim_any(JOBS_DIR, except_jobs=[claim.job.job_id]) is None
    assert await hasty.claim_any(JOBS_DIR) is not None


async def test_a_job_whose_workers_vanish_three_times_has_failed(hasty: JobStore) -> None:
    claim = await claimed(hasty)
    for _ in range(2):
        await lease_ends()
        await claimed_again(hasty)
    await lease_ends()
    job = await hasty.claim_any(JOBS_DIR)
    assert isinstance(job, Job)
    assert job == await hasty.get(claim.job.job_id)
    assert await hasty.claim_any(JOBS_DIR) is None
    assert (job.state, job.num_attempts, job.num_deaths) == (JobState.FAILED, 3, 3)
    assert "died 3 times" in job.reason
    assert job.ended_at_seconds is not None


async def test_a_death_that_is_told_counts_and_being_stopped_does_not(store: JobStore) -> None:
    claim = await claimed(store)
    for _ in range(5):
        assert await store.release(claim.lease, "drained") is JobState.QUEUED
        claim = await claimed_again(store)
    for _ in range(2):
        assert await store.release(claim.lease, "signal 9", has_died=True) is JobState.QUEUED
        claim = await claimed_again(store)
    assert await store.release(claim.lease, "signal 9", has_died=True) is JobState.FAILED
    job = await store.get(job_id_of("key"))
    assert (job.state, job.num_attempts) == (JobState.FAILED, 8)
    assert "signal 9" in job.reason


async def test_a_released_job_waits_for_its_delay(store: JobStore) -> None:
    claim = await claimed(store)
    await store.release(claim.lease, "died", has_died=True, delay_seconds=0.15)
    assert await store.claim_any(JOBS_DIR) is None
    await asyncio.sleep(0.2)
    assert await store.claim_any(JOBS_DIR) is not None


async def test_progress_is_told_with_the_heartbeat(store: JobStore) -> None:
    claim = await claimed(store)
    progress = RunProgress(
        "training", 3, 10, loss=0.5, metrics={"expert_share/math": 0.25}, remaining_seconds=7.0
    )
    await store.heartbeat(claim.lease, progress)
    revision = (await store.get(claim.job.job_id)).revision
    await store.heartbeat(claim.lease, progress)
    job = await store.get(claim.job.job_id)
    assert (job.progress, job.revision) == (progress, revision)


async def test_a_waiting_job_is_cancelled_at_once_and_again_is_the_same(store: JobStore) -> None:
    submitted = await store.submit(JobKind.SFT, CONFIG, "key")
    job = await store.cancel(submitted.job.job_id, Cancellation.SAVE)
    assert job.state is JobState.CANCELLED
    assert await store.cancel(submitted.job.job_id, Cancellation.SAVE) == job
    assert await store.claim_any(JOBS_DIR) is None


async def test_the_worker_of_a_running_job_hears_of_a_cancellation(store: JobStore) -> None:
    claim = await claimed(store)
    job = await store.cancel(claim.job.job_id, Cancellation.SAVE)
    assert (job.state, job.cancellation) == (JobState.RUNNING, Cancellation.SAVE)
    assert await store.heartbeat(claim.lease) is Cancellation.SAVE
    await store.cancel(claim.job.job_id, Cancellation.DISCARD)
    assert await store.heartbeat(claim.lease) is Cancellation.DISCARD
    await store.finish(claim.lease, JobState.CANCELLED, "on request")
    assert (await store.get(claim.job.job_id)).cancellation is None


async def test_a_cancelled_job_is_not_given_to_another_worker(hasty: JobStore) -> None:
    claim = await claimed(hasty)
    await hasty.cancel(claim.job.job_id, Cancellation.SAVE)
    await lease_ends()
    ended = await hasty.claim_any(JOBS_DIR)
    assert isinstance(ended, Job) and ended.state is JobState.CANCELLED
    assert await hasty.claim_any(JOBS_DIR) is None


async def test_a_cancelled_job_that_is_released_is_cancelled(store: JobStore) -> None:
    claim = await claimed(store)
    await store.cancel(claim.job.job_id, Cancellation.SAVE)
    assert await store.release(claim.lease, "drained") is JobState.CANCELLED


async def test_a_job_ends_once(store: JobStore) -> None:
    claim = await claimed(store)
    await store.finish(claim.lease, JobState.SUCCEEDED, "done")
    await store.finish(claim.lease, JobState.SUCCEEDED, "done")  # the answer was lost: said again
    assert await reason_of(store.finish(claim.lease, JobState.FAILED, "no")) is Reason.STALE_FENCE
    assert await reason_of(store.heartbeat(claim.lease)) is Reason.STALE_FENCE
    assert await reason_of(store.cancel(claim.job.job_id, Cancellation.SAVE)) is Reason.JOB_STATE
    assert await reason_of(store.resume(claim.job.job_id)) is Reason.JOB_STATE
    assert (await store.get(claim.job.job_id)).state is JobState.SUCCEEDED


async def test_a_commitment_is_final_whoever_carries_it_out(hasty: JobStore) -> None:
    claim = await claimed(hasty)
    assert await hasty.commit(claim.lease, "run-sft-1")
    assert await hasty.commit(claim.lease, "run-sft-1")
    assert await reason_of(hasty.cancel(claim.job.job_id, Cancellation.SAVE)) is Reason.JOB_STATE
    successor = claim
    for _ in range(4):  # more deaths than a job may have
        await lease_ends()
        successor = await claimed_again(hasty)
    assert await hasty.commit(successor.lease, "run-sft-1")
    await hasty.finish(successor.lease, JobState.SUCCEEDED, "published")
    assert (await hasty.get(claim.job.job_id)).checkpoint_id == "run-sft-1"


async def test_a_job_that_was_cancelled_first_may_not_publish(store: JobStore) -> None:
    claim = await claimed(store)
    await store.cancel(claim.job.job_id, Cancellation.SAVE)
    assert not await store.commit(claim.lease, "run-sft-1")


async def test_a_failed_job_names_no_checkpoint(store: JobStore) -> None:
    claim = await claimed(store)
    await store.commit(claim.lease, "run-sft-1")
    await store.finish(claim.lease, JobState.FAILED, "disk full")
    assert (await store.get(claim.job.job_id)).checkpoint_id == ""


async def test_a_cancelled_or_failed_job_is_resumed_with_a_clean_slate(hasty: JobStore) -> None:
    await claimed(hasty)
    await lease_ends()
    claim = await claimed_again(hasty)
    assert claim.job.num_deaths == 1
    await hasty.cancel(claim.job.job_id, Cancellation.SAVE)
    assert await reason_of(hasty.resume(claim.job.job_id)) is Reason.JOB_STATE
    await hasty.finish(claim.lease, JobState.CANCELLED, "on request")
    resumed = await hasty.resume(claim.job.job_id)
    assert (resumed.state, resumed.num_deaths, resumed.cancellation) == (JobState.QUEUED, 0, None)
    assert resumed.ended_at_seconds is None
    assert (await hasty.resume(claim.job.job_id)) == resumed
    again = await claimed_again(hasty)
    assert again.lease.fence > claim.lease.fence
    assert (await hasty.resume(claim.job.job_id)).state is JobState.RUNNING


async def test_watching_tells_every_change_and_ends_with_the_job(store: JobStore) -> None:
    await store.submit(JobKind.SFT, CONFIG, "key")
    seen = []

    async def watch() -> None:
        async with aclosing(store.watch(job_id_of("key"), poll_seconds=0.01)) as jobs:
            async for job in jobs:
                seen.append((job.state, job.progress.step if job.progress else None))

    async with asyncio.timeout(10):
        watching = asyncio.create_task(watch())
        await asyncio.sleep(0.05)
        claim = await claimed_again(store)
        await asyncio.sleep(0.05)
        await store.heartbeat(claim.lease, RunProgress("training", 1, 2))
        await asyncio.sleep(0.05)
        await store.finish(claim.lease, JobState.SUCCEEDED, "")
        await watching
    running, done = JobState.RUNNING, JobState.SUCCEEDED
    assert seen == [(JobState.QUEUED, None), (running, None), (running, 1), (done, 1)]


async def test_a_forgotten_job_leaves_the_list_and_never_repeats_a_fence(redis_client: Redis) -> None:
    store = new_store(redis_client, ttl_seconds=0.05)
    claim = await claimed(store)
    await store.finish(claim.lease, JobState.SUCCEEDED, "")
    await asyncio.sleep(0.1)
    assert await store.list_jobs(10) == []
    assert await reason_of(store.get(claim.job.job_id)) is Reason.JOB_UNKNOWN
    again = await claimed(store)
    assert again.lease.fence > claim.lease.fence


async def test_a_resumed_job_is_not_forgotten(redis_client: Redis) -> None:
    store = new_store(redis_client, ttl_seconds=0.05)
    submitted = await store.submit(JobKind.SFT, CONFIG, "key")
    await store.cancel(submitted.job.job_id, Cancellation.SAVE)
    await store.resume(submitted.job.job_id)
    await asyncio.sleep(0.1)
    assert (await store.get(submitted.job.job_id)).state is JobState.QUEUED


class RepeatingRunner(ScriptRunner):
    """Sends everything twice, as happens when the first answer is lost; the second answer counts."""

    async def run(self, *arguments, **options):  # type: ignore[override]
        await super().run(*arguments, **options)
        return await super().run(*arguments, **options)


async def test_every_word_may_be_said_twice(redis_client: Redis) -> None:
    store = new_store(redis_client)
    store._runner = RepeatingRunner(redis_client)
    assert (await store.submit(JobKind.SFT, CONFIG, "key")).created
    claim = await claimed_again(store)
    assert claim.job.num_attempts == 1
    await store.heartbeat(claim.lease, RunProgress("training", 1, 2))
    assert await store.release(claim.lease, "died", has_died=True) is JobState.QUEUED
    claim = await claimed_again(store)
    assert (claim.job.num_attempts, claim.job.num_deaths) == (2, 1)
    await store.cancel(claim.job.job_id, Cancellation.SAVE)
    await store.finish(claim.lease, JobState.CANCELLED, "on request")
    await store.resume(claim.job.job_id)
    claim = await claimed_again(store)
    assert await store.commit(claim.lease, "run-sft-1")
    await store.finish(claim.lease, JobState.SUCCEEDED, "published")
    job = await store.get(claim.job.job_id)
    assert (job.state, job.num_attempts, job.checkpoint_id) == (JobState.SUCCEEDED, 3, "run-sft-1")


async def test_jobs_outlive_a_restart_of_redis(tmp_path: Path) -> None:
    async with PrivateRedis(tmp_path / "redis") as first:
        client = connect(first.url)
        claim = await claimed(JobStore(client))
        await client.aclose()
    async with PrivateRedis(tmp_path / "redis") as second:
        client = connect(second.url)
        store = JobStore(client)
        assert await store.heartbeat(claim.lease) is None
        await client.aclose()


async def test_an_absent_redis_is_told_within_the_deadline(tmp_path: Path) -> None:
    client = connect(f"unix://{tmp_path}/nobody.sock")
    store = JobStore(client, deadline_seconds=0.1)
    assert await reason_of(store.heartbeat(Lease("0123456789ab", 1))) is Reason.STORE_UNAVAILABLE
    await client.aclose()
