"""The token log: behind the stream, exactly once, until another writer takes over."""

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest
from redis.asyncio import Redis

from fusionroute.errors import FusionRouteError, OutOfRoom, Reason, Unavailable
from fusionroute.private_redis import connect
from router_service.records import TokenRecord, pack_prompt
from router_service.session_store import SessionStore, session_keys
from router_service.stored_session import FinishReason, Lease, OpenTurn, SessionState, TurnParameters
from router_service.token_log import TokenLog
from tests.integration.lossy_proxy import LossyProxy

TURN = TurnParameters(seed=1, combine="sum", checkpoint="c")
HELD = pack_prompt([100])
OPEN = OpenTurn("r1", 1, TURN)


@pytest.fixture
async def proxy(redis_url: str, tmp_path: Path) -> AsyncIterator[LossyProxy]:
    async with LossyProxy(redis_url, tmp_path) as proxy:
        yield proxy


@pytest.fixture
async def store(proxy: LossyProxy) -> AsyncIterator[SessionStore]:
    client = connect(proxy.url)
    yield SessionStore(client, lease_seconds=1.0)
    await client.aclose()


@pytest.fixture
async def lease(store: SessionStore) -> Lease:
    lease = await store.acquire(uuid.uuid4().hex, "writer")
    await store.begin_turn(lease, 0, HELD, TURN, request_id="r1")
    return lease


async def stored_ids(store: SessionStore, lease: Lease) -> list[int]:
    ids: list[int] = (await store.get(lease.session_id)).records["token_id"].tolist()
    return ids


async def until(condition: Callable[[], Awaitable[bool]]) -> None:
    async with asyncio.timeout(5):
        while not await condition():
            await asyncio.sleep(0.01)


async def test_tokens_reach_the_store_in_order_and_in_few_calls(
    store: SessionStore, lease: Lease, proxy: LossyProxy
):
    before = proxy.num_commands
    async with TokenLog(store, lease, HELD, OPEN) as log:
        for token_id in range(200):
            log.append(TokenRecord(token_id))
        assert log.length == 201
        await log.flush()
        assert log.num_pending_tokens == 0
        assert proxy.num_commands - before <= 3
    assert await stored_ids(store, lease) == [100, *range(200)]


async def test_tokens_are_stored_without_anybody_waiting(store: SessionStore, lease: Lease):
    async with TokenLog(store, lease, HELD, OPEN) as log:
        log.append(TokenRecord(7))

        async def is_stored() -> bool:
            return await stored_ids(store, lease) == [100, 7]

        await until(is_stored)


async def test_leaving_stores_the_rest_and_gives_the_lease_back(store: SessionStore, lease: Lease):
    async with TokenLog(store, lease, HELD, OPEN, linger_seconds=10) as log:
        log.append(TokenRecord(7))
    session = await store.get(lease.session_id)
    assert session.length == 2
    assert session.state is SessionState.RUNNING and not session.is_being_written


async def test_a_cancelled_writer_stores_the_rest_too(store: SessionStore, lease: Lease):
    appended = asyncio.Event()

    async def write() -> None:
        async with TokenLog(store, lease, HELD, OPEN, linger_seconds=10) as log:
            log.append(TokenRecord(7))
            appended.set()
            await asyncio.sleep(60)

    task = asyncio.create_task(write())
    await appended.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await stored_ids(store, lease) == [100, 7]


async def test_finish_closes_the_turn_after_its_last_token(store: SessionStore, lease: Lease):
    async with TokenLog(store, lease, HELD, OPEN) as log:
        log.append(TokenRecord(7))
        await log.finish(FinishReason.STOP, stop="x")
    session = await store.get(lease.session_id)
    assert session.state is SessionState.FINISHED and session.turn is not None
    assert (session.turn.finish_reason, session.turn.stop, session.length) == (FinishReason.STOP, "x", 2)


async def test_the_store_may_trail_only_so_far(store: SessionStore, lease: Lease, proxy: LossyProxy):
    proxy.is_down = True
    async with TokenLog(store, lease, HELD, OPEN, max_pending_tokens=3) as log:
        for token_id in range(3):
            await log.room()
            log.append(TokenRecord(token_id))
        with pytest.raises(OutOfRoom):
            log.append(TokenRecord(3))
        waiting = asyncio.create_task(log.room())
        await asyncio.sleep(0.1)
        assert not waiting.done()
        proxy.is_down = False
        await asyncio.wait_for(waiting, 5)
        log.append(TokenRecord(3))
        assert log.waited_seconds > 0.05
    assert await stored_ids(store, lease) == [100, 0, 1, 2, 3]


async def test_an_outage_is_bridged(store: SessionStore, lease: Lease, proxy: LossyProxy):
    async with TokenLog(store, lease, HELD, OPEN, linger_seconds=0) as log:
        for token_id in range(60):
            proxy.is_down = 20 <= token_id < 40
            proxy.answers_to_lose = 1 if token_id % 7 == 0 else 0
            log.append(TokenRecord(token_id))
            await asyncio.sleep(0.005)
    assert await stored_ids(store, lease) == [100, *range(60)]
    assert proxy.num_lost > 0


async def test_an_outage_beyond_patience_is_told(store: SessionStore, lease: Lease, proxy: LossyProxy):
    with pytest.raises(Unavailable) as caught:
        async with TokenLog(store, lease, HELD, OPEN, patience_seconds=0.2) as log:
            proxy.is_down = True
            log.append(TokenRecord(7))
            while True:
                await log.room()
                await asyncio.sleep(0.01)
    assert caught.value.reason is Reason.STORE_UNAVAILABLE


async def test_a_flush_has_a_deadline(store: SessionStore, lease: Lease, proxy: LossyProxy):
    async with TokenLog(store, lease, HELD, OPEN) as log:
        proxy.is_down = True
        log.append(TokenRecord(7))
        with pytest.raises(Unavailable, match=r"1 tokens were not stored within 0\.1 s"):
            await log.flush(0.1)
        proxy.is_down = False


async def test_a_writer_that_was_overtaken_is_told_lease_lost(
    store: SessionStore, lease: Lease, redis_client: Redis
):
    with pytest.raises(FusionRouteError) as caught:
        async with TokenLog(store, lease, HELD, OPEN) as log:
            await redis_client.delete(session_keys(lease.session_id)[2])
            other = await store.acquire(lease.session_id, "other")
            await store.append(other, 1, pack_prompt([5]))
            log.append(TokenRecord(7))
            await log.flush()
    assert caught.value.reason is Reason.LEASE_LOST
    assert await stored_ids(store, lease) == [100, 5]
    assert (await store.get(lease.session_id)).is_being_written  # the other's lease was left alone


async def test_a_writer_of_a_deleted_session_is_told_so(store: SessionStore, lease: Lease):
    with pytest.raises(FusionRouteError) as caught:
        async with TokenLog(store, lease, HELD, OPEN) as log:
            await store.delete(lease.session_id)
            log.append(TokenRecord(7))
            await log.flush()
    assert caught.value.reason is Reason.SESSION_UNKNOWN


async def test_an_open_log_keeps_the_lease_alive_while_no_token_comes(proxy: LossyProxy):
    client = connect(proxy.url)
    store = SessionStore(client, lease_seconds=0.15)
    lease = await store.acquire(uuid.uuid4().hex, "writer")
    async with TokenLog(store, lease, b"", OPEN):
        stop = time.monotonic() + 0.6
        while time.monotonic() < stop:
            assert (await store.get(lease.session_id)).is_being_written
            await asyncio.sleep(0.01)
    await client.aclose()


async def test_a_cancellation_reaches_a_writer_that_waits(store: SessionStore, lease: Lease):
    async with TokenLog(store, lease, HELD, OPEN) as log:
        assert not log.cancel_requested
        await store.cancel(lease.session_id)

        async def is_known() -> bool:
            return log.cancel_requested

        await until(is_known)


async def test_a_tail_that_a_fail_over_lost_is_sent_again(
    store: SessionStore, lease: Lease, redis_client: Redis
):
    async with TokenLog(store, lease, HELD, OPEN) as log:
        for token_id in range(5):
            log.append(TokenRecord(token_id))
        await log.flush()
        tok = session_keys(lease.session_id)[1]
        kept = await redis_client.getrange(tok, 0, 3 * 16 - 1)
        await redis_client.execute_command("SET", tok, pack_prompt([100, 0, 1]), "KEEPTTL")
        assert kept == pack_prompt([100, 0, 1])
        log.append(TokenRecord(5))
    assert await stored_ids(store, lease) == [100, *range(6)]
