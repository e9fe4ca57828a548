"""The session store: who may write, what a repetition does, what is remembered."""

import asyncio
import uuid
from dataclasses import replace
from pathlib import Path

import pytest
from redis.asyncio import Redis

from fusionroute.errors import InternalFault, InvalidRequest, Reason, SessionStateError, Unavailable
from fusionroute.private_redis import PrivateRedis, connect
from router_service.records import TokenRecord, TokenSource, pack, pack_prompt, to_token_records
from router_service.session_store import SessionStore, session_keys
from router_service.stored_session import (
    FinishReason,
    Lease,
    OpenTurn,
    SessionState,
    TurnParameters,
    WriteVerdict,
)
from tests.integration.lossy_proxy import LossyProxy

TURN = TurnParameters(
    seed=2**64 - 1, combine="sum", checkpoint="c0ffee", sampling={"top_k": 5, "stop": ["é"]}
)


@pytest.fixture
def sid() -> str:
    return uuid.uuid4().hex


@pytest.fixture
def store(redis_client: Redis) -> SessionStore:
    return SessionStore(redis_client)


async def silence(redis_client: Redis, sid: str) -> None:
    """Makes the session's writer look as if it had been silent for longer than its lease."""
    assert await redis_client.delete(session_keys(sid)[2]) == 1


async def stored_ids(store: SessionStore, sid: str) -> list[int]:
    ids: list[int] = (await store.get(sid)).records["token_id"].tolist()
    return ids


async def test_a_new_session_is_empty_and_leased(store: SessionStore, sid: str):
    lease = await store.acquire(sid, "one")
    session = await store.get(sid)
    assert session.state is SessionState.EMPTY and session.turn is None
    assert (session.length, len(session.records), session.fence) == (0, 0, lease.fence)
    assert session.is_being_written


async def test_the_same_owner_keeps_its_fence(store: SessionStore, sid: str, redis_client: Redis):
    first = await store.acquire(sid, "one")
    assert await store.acquire(sid, "one") == first
    await silence(redis_client, sid)
    assert await store.acquire(sid, "one") == first


async def test_a_second_writer_waits_while_the_first_is_alive(store: SessionStore, sid: str):
    await store.acquire(sid, "one")
    with pytest.raises(SessionStateError) as caught:
        await store.acquire(sid, "two")
    assert caught.value.reason is Reason.SESSION_BUSY
    assert caught.value.retry_after_seconds == pytest.approx(store.lease_seconds, abs=1.0)


async def test_a_lease_really_ends(redis_client: Redis, sid: str):
    store = SessionStore(redis_client, lease_seconds=0.05)
    first = await store.acquire(sid, "one")
    await asyncio.sleep(0.1)
    assert (await store.acquire(sid, "two")).fence > first.fence


async def test_fences_grow_even_over_a_deletion(store: SessionStore, sid: str, redis_client: Redis):
    fences = []
    for owner in ("one", "two", "three"):
        fences.append((await store.acquire(sid, owner)).fence)
        await silence(redis_client, sid)
    await store.delete(sid)
    fences.append((await store.acquire(sid, "one")).fence)
    assert fences == sorted(set(fences))


async def test_an_unknown_session_is_not_created_unasked(store: SessionStore, sid: str):
    with pytest.raises(SessionStateError) as caught:
        await store.acquire(sid, "one", create=False)
    assert caught.value.reason is Reason.SESSION_UNKNOWN
    with pytest.raises(SessionStateError):
        await store.get(sid)


async def test_appended_records_come_back(store: SessionStore, sid: str):
    lease = await store.acquire(sid, "one")
    await store.append(lease, 0, pack_prompt([7, 2**32 - 1]))
    written = TokenRecord(5, -0.5, TokenSource.EXPERT, expert=3, epoch=70_000)
    outcome = await store.append(lease, 2, pack([written]))
    assert (outcome.verdict, outcome.length) == (WriteVerdict.DONE, 3)
    prompt = [TokenRecord(7), TokenRecord(2**32 - 1)]
    assert to_token_records((await store.get(sid)).records) == [*prompt, written]
    assert (await store.get(sid, from_position=2)).records["token_id"].tolist() == [5]
    assert len((await store.get(sid, from_position=9)).records) == 0


async def test_the_same_append_again_is_done(store: SessionStore, sid: str):
    lease = await store.acquire(sid, "one")
    for _ in range(3):
        outcome = await store.append(lease, 0, pack_prompt([1, 2, 3]))
        assert outcome.verdict is WriteVerdict.DONE
    assert await stored_ids(store, sid) == [1, 2, 3]


async def test_an_append_that_overlaps_adds_only_what_is_new(store: SessionStore, sid: str):
    lease = await store.acquire(sid, "one")
    await store.append(lease, 0, pack_prompt([1, 2, 3]))
    assert (await store.append(lease, 1, pack_prompt([2, 3, 4, 5]))).length == 5
    assert (await store.append(lease, 1, pack_prompt([2, 3]))).verdict is WriteVerdict.DONE
    assert await stored_ids(store, sid) == [1, 2, 3, 4, 5]


async def test_a_gap_is_told_with_the_stored_length(store: SessionStore, sid: str):
    lease = await store.acquire(sid, "one")
    await store.append(lease, 0, pack_prompt([1, 2]))
    outcome = await store.append(lease, 3, pack_prompt([4]))
    assert (outcome.verdict, outcome.length) == (WriteVerdict.GAP, 2)
    assert await stored_ids(store, sid) == [1, 2]


async def test_stored_tokens_are_never_overwritten(store: SessionStore, sid: str):
    lease = await store.acquire(sid, "one")
    await store.append(lease, 0, pack_prompt([1, 2]))
    assert (await store.append(lease, 1, pack_prompt([9, 9]))).verdict is WriteVerdict.CONFLICT
    assert await stored_ids(store, sid) == [1, 2]


async def test_a_stale_fence_is_refused(store: SessionStore, sid: str, redis_client: Redis):
    old = await store.acquire(sid, "one")
    await silence(redis_client, sid)
    new = await store.acquire(sid, "two")
    writes = [
        store.append(old, 0, pack_prompt([1])),
        store.begin_turn(old, 0, b"", TURN),
        store.finish(old, 0, FinishReason.EOS),
    ]
    for write in writes:
        with pytest.raises(SessionStateError) as caught:
            await write
        assert caught.value.reason is Reason.STALE_FENCE
    with pytest.raises(SessionStateError) as caught:
        await store.renew(old)
    assert caught.value.reason is Reason.LEASE_LOST
    await store.release(old)
    session = await store.get(sid)
    assert (session.length, session.turn, session.fence) == (0, None, new.fence)
    assert session.is_being_written


async def test_a_silent_writer_goes_on_if_nobody_took_over(
    store: SessionStore, sid: str, redis_client: Redis
):
    lease = await store.acquire(sid, "one")
    await silence(redis_client, sid)
    assert (await store.append(lease, 0, pack_prompt([1]))).verdict is WriteVerdict.DONE
    assert (await store.get(sid)).is_being_written


async def test_a_lease_that_was_given_back_writes_no_more(store: SessionStore, sid: str):
    lease = await store.acquire(sid, "one")
    await store.release(lease)
    await store.release(lease)
    with pytest.raises(SessionStateError) as caught:
        await store.append(lease, 0, pack_prompt([1]))
    assert caught.value.reason is Reason.LEASE_LOST
    assert (await store.acquire(sid, "one")).fence > lease.fence


async def test_a_turn_is_remembered_whole(store: SessionStore, sid: str):
    lease = await store.acquire(sid, "one")
    begun = await store.begin_turn(lease, 0, pack_prompt([1, 2]), TURN, request_id="r1")
    assert (begun.is_new, begun.answer_position, begun.length) == (True, 2, 2)
    running = await store.get(sid)
    assert running.state is SessionState.RUNNING and running.turn is not None
    assert running.turn.parameters == TURN
    assert (running.turn.request_id, running.turn.answer_position) == ("r1", 2)
    assert running.turn.finish_reason is None
    await store.append(lease, 2, pack([TokenRecord(3)]))
    await store.finish(lease, 3, FinishReason.STOP, stop="\n\n")
    finished = await store.get(sid)
    assert finished.state is SessionState.FINISHED and finished.turn is not None
    assert (finished.turn.finish_reason, finished.turn.stop) == (FinishReason.STOP, "\n\n")
    assert not finished.is_being_written


async def test_a_further_turn_follows_the_first(store: SessionStore, sid: str):
    first = await store.acquire(sid, "one")
    await store.begin_turn(first, 0, pack_prompt([1]), TURN)
    await store.finish(first, 1, FinishReason.STOP, stop="x")
    second = await store.acquire(sid, "two")
    assert second.length == 1
    assert (await store.begin_turn(second, 1, pack_prompt([2, 3]), TURN)).answer_position == 3
    session = await store.get(sid)
    assert session.state is SessionState.RUNNING and session.turn is not None
    assert (session.turn.finish_reason, session.turn.stop) == (None, "")
    assert session.records["token_id"].tolist() == [1, 2, 3]


async def test_begin_turn_again_under_the_same_fence_is_the_same_call(store: SessionStore, sid: str):
    lease = await store.acquire(sid, "one")
    begun = await store.begin_turn(lease, 0, pack_prompt([1, 2]), TURN, request_id="r1")
    assert await store.begin_turn(lease, 0, pack_prompt([1, 2]), TURN, request_id="r1") == begun
    assert await stored_ids(store, sid) == [1, 2]


async def test_a_request_id_begins_one_turn_only(store: SessionStore, sid: str):
    first = await store.acquire(sid, "one")
    await store.begin_turn(first, 0, pack_prompt([1, 2]), TURN, request_id="r1")
    await store.append(first, 2, pack_prompt([3]))
    await store.release(first)
    second = await store.acquire(sid, "two")
    begun = await store.begin_turn(second, 3, pack_prompt([1, 2]), TURN, request_id="r1")
    assert (begun.is_new, begun.answer_position, begun.length) == (False, 2, 3)
    assert await stored_ids(store, sid) == [1, 2, 3]


@pytest.mark.parametrize("position", [0, 3])
async def test_a_turn_begins_only_at_the_sessions_end(store: SessionStore, sid: str, position: int):
    lease = await store.acquire(sid, "one")
    await store.append(lease, 0, pack_prompt([1, 2]))
    with pytest.raises(SessionStateError) as caught:
        await store.begin_turn(lease, position, pack_prompt([1, 2]), TURN)
    assert (caught.value.reason, caught.value.cached_length) == (Reason.POSITION_AHEAD, 2)
    assert (await store.get(sid)).turn is None


async def test_a_turn_with_a_missing_tail_is_not_closed(store: SessionStore, sid: str):
    lease = await store.acquire(sid, "one")
    await store.begin_turn(lease, 0, pack_prompt([1]), TURN)
    with pytest.raises(SessionStateError) as caught:
        await store.finish(lease, 2, FinishReason.EOS)
    assert caught.value.cached_length == 1
    assert (await store.get(sid)).state is SessionState.RUNNING


async def test_finish_again_is_done(store: SessionStore, sid: str):
    lease = await store.acquire(sid, "one")
    await store.begin_turn(lease, 0, pack_prompt([1]), TURN)
    await store.finish(lease, 1, FinishReason.EOS)
    await store.finish(lease, 1, FinishReason.EOS)
    with pytest.raises(SessionStateError):
        await store.finish(lease, 1, FinishReason.LENGTH)


async def test_the_writer_learns_of_a_cancellation(store: SessionStore, sid: str):
    lease = await store.acquire(sid, "one")
    assert not (await store.cancel(sid)).was_running
    await store.begin_turn(lease, 0, pack_prompt([1]), TURN)
    assert not (await store.append(lease, 1, pack_prompt([2]))).cancel_requested
    outcome = await store.cancel(sid)
    assert outcome.was_running and outcome.writer_is_alive
    assert (await store.append(lease, 2, pack_prompt([3]))).cancel_requested
    assert (await store.renew(lease)).cancel_requested
    await store.finish(lease, 3, FinishReason.CANCELLED)
    next_lease = await store.acquire(sid, "two")
    await store.begin_turn(next_lease, 3, pack_prompt([4]), TURN)
    assert not (await store.renew(next_lease)).cancel_requested


async def test_cancelling_tells_when_the_writer_is_gone(store: SessionStore, sid: str, redis_client: Redis):
    lease = await store.acquire(sid, "one")
    await store.begin_turn(lease, 0, pack_prompt([1]), TURN)
    await silence(redis_client, sid)
    outcome = await store.cancel(sid)
    assert outcome.was_running and not outcome.writer_is_alive


async def test_a_deleted_session_is_gone_for_its_writer_too(
    store: SessionStore, sid: str, redis_client: Redis
):
    lease = await store.acquire(sid, "one")
    await store.append(lease, 0, pack_prompt([1]))
    assert await store.delete(sid)
    assert not await store.delete(sid)
    with pytest.raises(SessionStateError) as caught:
        await store.append(lease, 1, pack_prompt([2]))
    assert caught.value.reason is Reason.SESSION_UNKNOWN
    *parts, gone = session_keys(sid)
    assert await redis_client.exists(*parts) == 0
    assert 0 < await redis_client.pttl(gone) <= 600_000


async def write_everything(store: SessionStore, sid: str) -> Lease:
    lease = await store.acquire(sid, "one")
    await store.begin_turn(lease, 0, pack_prompt([1]), TURN)
    await store.append(lease, 1, pack_prompt([2]))
    await store.renew(lease)
    return lease


async def test_every_key_has_a_time_to_live(redis_client: Redis, sid: str):
    store = SessionStore(redis_client, ttl_seconds=1000, lease_seconds=10)
    lease = await write_everything(store, sid)
    meta, tok, lease_key, _ = session_keys(sid)
    times = [await redis_client.pttl(key) / 1000 for key in (meta, tok, lease_key)]
    assert times == pytest.approx([1000, 1001, 10], abs=0.5)
    await store.finish(lease, 2, FinishReason.EOS)
    assert await redis_client.exists(lease_key) == 0
    assert (await store.get(sid)).expires_in_seconds == pytest.approx(1000, abs=1.0)


async def test_a_session_is_forgotten_after_its_time(redis_client: Redis, sid: str):
    store = SessionStore(redis_client, ttl_seconds=0.05, lease_seconds=0.01)
    await write_everything(store, sid)
    await asyncio.sleep(0.1)
    with pytest.raises(SessionStateError):
        await store.get(sid)
    lease = await store.acquire(sid, "two")
    assert lease.length == 0  # the tokens of the forgotten session do not come back


async def test_each_operation_is_one_round_trip(redis_url: str, tmp_path: Path, sid: str):
    async with LossyProxy(redis_url, tmp_path) as proxy:
        client = connect(proxy.url)
        store = SessionStore(client)
        lease = await write_everything(store, sid)  # the scripts are known to Redis from here on
        await store.get(sid)
        before = proxy.num_commands
        await write_everything(store, uuid.uuid4().hex)
        await store.get(sid)
        await store.append(lease, 2, pack_prompt([3]))
        assert proxy.num_commands - before == 6
        await client.aclose()


async def test_operations_whose_answers_are_lost_are_repeated_without_harm(
    redis_url: str, tmp_path: Path, sid: str
):
    async with LossyProxy(redis_url, tmp_path) as proxy:
        client = connect(proxy.url)
        store = SessionStore(client)
        proxy.answers_to_lose = 2
        lease = await store.acquire(sid, "one")
        proxy.answers_to_lose = 2
        assert (await store.begin_turn(lease, 0, pack_prompt([1, 2]), TURN)).is_new
        proxy.answers_to_lose = 2
        await store.append(lease, 2, pack_prompt([3, 4]))
        proxy.answers_to_lose = 2
        await store.finish(lease, 4, FinishReason.EOS)
        assert await stored_ids(store, sid) == [1, 2, 3, 4]
        assert proxy.num_lost == 8
        await client.aclose()


async def test_a_connection_that_hangs_is_replaced_within_the_deadline(
    redis_url: str, tmp_path: Path, sid: str
):
    async with LossyProxy(redis_url, tmp_path) as proxy:
        client = connect(proxy.url, timeout_seconds=0.1)
        store = SessionStore(client)
        lease = await store.acquire(sid, "one")
        proxy.is_mute = True
        appending = asyncio.create_task(store.append(lease, 0, pack_prompt([1, 2])))
        await asyncio.sleep(0.15)
        proxy.is_mute = False
        assert (await appending).verdict is WriteVerdict.DONE
        assert await stored_ids(store, sid) == [1, 2]
        await client.aclose()


async def test_an_absent_redis_is_told_at_the_deadline():
    with PrivateRedis() as server:
        url = server.url
    client = connect(url)
    store = SessionStore(client, deadline_seconds=0.2)
    with pytest.raises(Unavailable, match=url) as caught:
        await store.acquire("s", "one")
    assert caught.value.reason is Reason.STORE_UNAVAILABLE
    await client.aclose()


async def test_tokens_that_redis_lost_are_noticed(store: SessionStore, sid: str, redis_client: Redis):
    lease = await store.acquire(sid, "one")
    await store.begin_turn(lease, 0, pack_prompt([1, 2]), TURN)
    await redis_client.delete(session_keys(sid)[1])
    with pytest.raises(InternalFault, match="has lost tokens: 0 are left of 2"):
        await store.get(sid)


@pytest.mark.parametrize("bad", ["", "a}b", "a b", "x" * 129, "ü"])
async def test_a_session_id_that_could_leave_its_hash_tag_is_refused(store: SessionStore, bad: str):
    with pytest.raises(InvalidRequest) as caught:
        await store.acquire(bad, "one")
    assert caught.value.metadata["field"] == "session_id"


async def test_a_fence_is_the_clock_in_microseconds_and_exact(
    store: SessionStore, sid: str, redis_client: Redis
):
    seconds, microseconds = await redis_client.time()
    first = await store.acquire(sid, "one")
    assert 0 <= first.fence - (seconds * 1_000_000 + microseconds) < 60_000_000
    meta, _, lease_key, _ = session_keys(sid)
    ahead = 2**53 - 5  # a clock that was set back; still exact in Lua
    await redis_client.hset(meta, "fence", ahead)
    await redis_client.delete(lease_key)
    assert (await store.acquire(sid, "two")).fence == ahead + 1


async def test_a_redis_that_went_back_in_time_grants_no_fence_twice(
    store: SessionStore, sid: str, redis_client: Redis
):
    meta, _, lease_key, _ = session_keys(sid)
    first = await store.acquire(sid, "one")
    await redis_client.delete(lease_key)
    second = await store.acquire(sid, "two")
    await redis_client.hset(meta, mapping={"fence": first.fence, "owner": "one"})
    await redis_client.delete(lease_key)
    third = await store.acquire(sid, "three")
    assert first.fence < second.fence < third.fence


async def test_a_write_needs_the_owner_besides_the_fence(store: SessionStore, sid: str):
    lease = await store.acquire(sid, "one")
    with pytest.raises(SessionStateError) as caught:
        await store.append(replace(lease, owner="two"), 0, pack_prompt([1]))
    assert caught.value.reason is Reason.STALE_FENCE


async def test_restoring_what_another_writer_has_succeeded_is_refused(
    store: SessionStore, sid: str, redis_client: Redis
):
    first = await store.acquire(sid, "one")
    await store.begin_turn(first, 0, pack_prompt([1]), TURN, request_id="r1")
    await redis_client.delete(session_keys(sid)[2])
    second = await store.acquire(sid, "two")
    await store.append(second, 1, pack_prompt([2]))
    with pytest.raises(SessionStateError) as caught:
        await store.restore(first, pack_prompt([1, 3]), OpenTurn("r1", 1, TURN))
    assert caught.value.reason is Reason.STALE_FENCE
    assert await stored_ids(store, sid) == [1, 2]


async def test_restoring_keeps_a_wish_to_cancel(store: SessionStore, sid: str, redis_client: Redis):
    lease = await store.acquire(sid, "one")
    await store.begin_turn(lease, 0, pack_prompt([1]), TURN, request_id="r1")
    await store.cancel(sid)
    await redis_client.hset(session_keys(sid)[0], "fence", lease.fence - 1)
    outcome = await store.restore(lease, pack_prompt([1, 2]), OpenTurn("r1", 1, TURN))
    assert outcome.cancel_requested
    assert (await store.get(sid)).fence == lease.fence
    assert await stored_ids(store, sid) == [1, 2]
