"""The promotion in Redis: compare and set, rollbacks, repetitions."""

from __future__ import annotations

import asyncio
from uuid import uuid4

import pytest
from redis.asyncio import Redis

from fusionroute.errors import FusionRouteError, InvalidRequest, Reason
from fusionroute.promotions import PromotedCheckpoint, PromotionStore

NONE = PromotedCheckpoint()
A, B = PromotedCheckpoint("run-sft-a", "fa"), PromotedCheckpoint("run-cdpo-b", "fb")


@pytest.fixture
def store(redis_client: Redis) -> PromotionStore:
    return PromotionStore(redis_client, namespace=uuid4().hex)


async def reason_of(call: object) -> Reason:
    with pytest.raises(FusionRouteError) as caught:
        await call  # type: ignore[misc]
    return caught.value.reason


async def test_nothing_is_promoted_at_first_and_nothing_can_be_rolled_back(store: PromotionStore) -> None:
    promotion = await store.read()
    assert (promotion.revision, promotion.current, promotion.previous) == (0, NONE, ())
    assert await reason_of(store.rollback(0)) is Reason.NOTHING_TO_ROLL_BACK


async def test_rollbacks_lead_back_step_by_step_to_what_routers_have_of_their_own(
    store: PromotionStore,
) -> None:
    first = await store.promote(A.checkpoint_id, A.fingerprint, 0)
    second = await store.promote(B.checkpoint_id, B.fingerprint, first.revision)
    assert (second.current, second.previous) == (B, (NONE, A))
    back = await store.rollback(second.revision)
    assert (back.current, back.previous) == (A, (NONE,))
    home = await store.rollback(back.revision)
    assert (home.current, home.previous) == (NONE, ())
    assert 0 < first.revision < second.revision < back.revision < home.revision
    assert await store.read() == home
    assert await reason_of(store.rollback(home.revision)) is Reason.NOTHING_TO_ROLL_BACK


async def test_of_two_who_saw_the_same_revision_only_one_changes_it(store: PromotionStore) -> None:
    first = await store.promote(A.checkpoint_id, A.fingerprint, 0)
    calls = (store.promote(f"c{n}", "f", first.revision) for n in range(8))
    outcomes = await asyncio.gather(*calls, return_exceptions=True)
    refused = [each for each in outcomes if isinstance(each, FusionRouteError)]
    assert len(refused) == 7
    assert {each.reason for each in refused} == {Reason.REVISION_CONFLICT}
    current = await store.read()
    assert refused[0].metadata["revision"] == str(current.revision)
    assert await reason_of(store.rollback(first.revision)) is Reason.REVISION_CONFLICT


async def test_a_repeated_call_changes_nothing_more(store: PromotionStore) -> None:
    first = await store.promote(A.checkpoint_id, A.fingerprint, 0)
    assert await store.promote(A.checkpoint_id, A.fingerprint, 0) == first
    second = await store.promote(B.checkpoint_id, B.fingerprint, first.revision)
    back = await store.rollback(second.revision)
    assert await store.rollback(second.revision) == back


async def test_promoting_the_current_checkpoint_changes_nothing(store: PromotionStore) -> None:
    first = await store.promote(A.checkpoint_id, A.fingerprint, 0)
    assert await store.promote(A.checkpoint_id, A.fingerprint, first.revision) == first


async def test_the_promotion_outlives_every_session(redis_client: Redis) -> None:
    namespace = uuid4().hex
    await PromotionStore(redis_client, namespace=namespace).promote("a", "f", 0)
    assert await redis_client.ttl(f"fr:promotion:{{{namespace}}}") == -1


@pytest.mark.parametrize("bad", ["", "..", "a/b", ".hidden", "x" * 201])
async def test_an_id_that_is_no_name_of_a_folder_is_refused(store: PromotionStore, bad: str) -> None:
    with pytest.raises(InvalidRequest, match="checkpoint_id"):
        await store.promote(bad, "f", 0)
