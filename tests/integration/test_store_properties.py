"""Whatever is repeated, delayed or written by the overtaken: a session holds exactly its owners' tokens."""

import asyncio
import itertools
import tempfile
import uuid
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from fusionroute.errors import Reason, SessionStateError
from fusionroute.private_redis import connect
from router_service.records import TokenRecord, pack_prompt
from router_service.session_store import SessionStore, session_keys
from router_service.stored_session import Lease, OpenTurn, TurnParameters, WriteVerdict
from router_service.token_log import TokenLog
from tests.integration.lossy_proxy import LossyProxy

OPEN = OpenTurn("r1", 0, TurnParameters(seed=0, combine="sum", checkpoint="c"))
WRITERS = st.integers(0, 2)
STEPS = st.one_of(
    st.tuples(st.just("acquire"), WRITERS, st.just(0)),
    st.tuples(st.just("silence"), st.just(0), st.just(0)),
    st.tuples(st.just("append"), WRITERS, st.integers(1, 4)),
    st.tuples(st.just("repeat"), st.integers(0, 30), st.integers(0, 2)),
    st.tuples(st.just("release"), WRITERS, st.just(0)),
    st.tuples(st.just("turn"), WRITERS, st.integers(0, 3)),
)


class World:
    """Three writers of one session. The oracle: fresh tokens, in the order of their owners."""

    def __init__(self, store: SessionStore) -> None:
        self.store = store
        self.sid = uuid.uuid4().hex
        self.leases: dict[int, Lease] = {}
        self.owner: int | None = None
        self.believed_length: dict[int, int] = {}
        self.fresh_ids = itertools.count()
        self.expected: list[int] = []
        self.appends: list[tuple[Lease, int, bytes]] = []

    async def acquire(self, writer: int, _: int) -> None:
        try:
            lease = await self.store.acquire(self.sid, f"writer {writer}")
        except SessionStateError as error:
            assert error.reason is Reason.SESSION_BUSY
            assert self.owner not in (None, writer)
            return
        if self.owner != writer:
            assert all(lease.fence > other.fence for other in self.leases.values())
        self.owner, self.leases[writer] = writer, lease
        assert lease.length == len(self.expected)
        self.believed_length[writer] = lease.length

    async def silence(self, _: int, __: int) -> None:
        await self.store._client.delete(session_keys(self.sid)[2])

    async def append(self, writer: int, count: int) -> None:
        if writer not in self.leases:
            return
        ids = list(itertools.islice(self.fresh_ids, count))
        call = (self.leases[writer], self.believed_length[writer], pack_prompt(ids))
        self.appends.append(call)
        try:
            outcome = await self.store.append(*call)
        except SessionStateError as error:
            assert error.reason in (Reason.STALE_FENCE, Reason.LEASE_LOST)
            assert writer != self.owner
            return
        assert writer == self.owner and outcome.verdict is WriteVerdict.DONE
        self.expected += ids
        self.believed_length[writer] += count

    async def repeat(self, which: int, overlap: int) -> None:
        """An earlier append arrives once more, perhaps together with the one that followed it."""
        if not self.appends:
            return
        first = which % len(self.appends)
        lease, position, records = self.appends[first]
        for later_lease, _, later_records in self.appends[first + 1 : first + 1 + overlap]:
            if later_lease == lease:
                records += later_records
        try:
            outcome = await self.store.append(lease, position, records)
        except SessionStateError as error:
            assert error.reason in (Reason.STALE_FENCE, Reason.LEASE_LOST, Reason.SESSION_UNKNOWN)
            return
        assert outcome.verdict is WriteVerdict.DONE or overlap

    async def release(self, writer: int, _: int) -> None:
        if writer in self.leases:
            await self.store.release(self.leases[writer])
            if self.owner == writer:
                self.owner = None

    async def turn(self, writer: int, count: int) -> None:
        if writer not in self.leases:
            return
        ids = list(itertools.islice(self.fresh_ids, count))
        position = self.believed_length[writer]
        turn = TurnParameters(seed=0, combine="sum", checkpoint="c")
        try:
            begun = await self.store.begin_turn(self.leases[writer], position, pack_prompt(ids), turn)
        except SessionStateError as error:
            assert error.reason in (Reason.STALE_FENCE, Reason.LEASE_LOST)
            assert writer != self.owner
            return
        assert writer == self.owner and begun.is_new
        self.expected += ids
        self.believed_length[writer] += count


@settings(max_examples=150, deadline=None)
@given(steps=st.lists(STEPS, min_size=1, max_size=40))
def test_any_interleaving_leaves_exactly_the_tokens_of_the_owners(redis_url: str, steps):
    async def run() -> None:
        client = connect(redis_url)
        world = World(SessionStore(client))
        await world.acquire(0, 0)
        for verb, first, second in steps:
            await getattr(world, verb)(first, second)
            session = await world.store.get(world.sid)
            assert session.records["token_id"].tolist() == world.expected
        await client.aclose()

    asyncio.run(run())


@settings(max_examples=25, deadline=None)
@given(
    pauses=st.lists(st.sampled_from([0.0, 0.0, 0.001]), min_size=1, max_size=40),
    losses=st.lists(st.integers(0, 2), min_size=40, max_size=40),
    outage=st.tuples(st.integers(0, 40), st.integers(0, 10)),
    linger_seconds=st.sampled_from([0.0, 0.002]),
)
def test_a_log_over_a_bad_network_stores_each_token_once(redis_url, pauses, losses, outage, linger_seconds):
    async def run(folder: Path) -> None:
        async with LossyProxy(redis_url, folder) as proxy:
            client = connect(proxy.url)
            store = SessionStore(client)
            lease = await store.acquire(uuid.uuid4().hex, "writer")
            async with TokenLog(store, lease, b"", OPEN, linger_seconds=linger_seconds) as log:
                for token_id, pause in enumerate(pauses):
                    proxy.answers_to_lose = losses[token_id]
                    proxy.is_down = outage[0] <= token_id < outage[0] + outage[1]
                    await log.room()
                    log.append(TokenRecord(token_id))
                    await asyncio.sleep(pause)
                proxy.is_down = False
            session = await store.get(lease.session_id)
            assert session.records["token_id"].tolist() == list(range(len(pauses)))
            await client.aclose()

    with tempfile.TemporaryDirectory() as folder:
        asyncio.run(run(Path(folder)))
