"""Who serves a slot after swaps, rollbacks, takeovers and lost answers; a slot's epoch only grows."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from redis.asyncio import Redis

from fusionroute.errors import FusionRouteError, InvalidRequest, Reason, SessionStateError, Unavailable
from fusionroute.private_redis import connect
from fusionroute.v1 import common_pb2, registry_pb2
from fusionroute.v1.registry_pb2 import (
    DRAIN_POLICY_FINISH,
    DRAIN_POLICY_MIGRATE,
    EXPERT_STATE_DRAINING,
    EXPERT_STATE_READY,
    EXPERT_STATE_STANDBY,
    ExpertEntry,
)
from router_service.registry_store import RegistryStore

READY, DRAINING, STANDBY = EXPERT_STATE_READY, EXPERT_STATE_DRAINING, EXPERT_STATE_STANDBY


def an_entry(name: str, weights: str, loaded: int, *, slot: str = "math", address: str = "") -> ExpertEntry:
    model = common_pb2.ModelIdentity(weights_fingerprint=weights, epoch=loaded)
    return ExpertEntry(instance_id=name, slot=slot, address=address or f"{name}:1", model=model)


@pytest.fixture
def store(redis_client: Redis) -> RegistryStore:
    return RegistryStore(redis_client, namespace=uuid.uuid4().hex)


async def states(store: RegistryStore) -> dict[str, registry_pb2.ExpertState.ValueType]:
    return {entry.instance_id: entry.state for entry in await store.entries()}


async def epochs(store: RegistryStore) -> dict[str, int]:
    return {entry.instance_id: entry.epoch for entry in await store.entries()}


async def revision(store: RegistryStore) -> int:
    return (await store.list()).revision


async def old_and_new(store: RegistryStore, weights: str = "b") -> None:
    """One that serves and one that stands by."""
    await store.register(an_entry("old", "a", 1))
    await store.register(an_entry("new", weights, 2), standby=True)


async def refused(call: object) -> FusionRouteError:
    with pytest.raises(FusionRouteError) as caught:
        await call  # type: ignore[misc]
    return caught.value


async def test_an_instance_on_standby_serves_only_once_it_is_swapped_in(store: RegistryStore):
    await old_and_new(store)
    assert await states(store) == {"old": READY, "new": STANDBY}
    before = await epochs(store)
    assert before["new"] == 0 < before["old"]
    assert (await store.register(an_entry("new", "b", 2))).state == STANDBY
    assert await store.heartbeat("new", common_pb2.Load()) == STANDBY
    done = await store.swap("math", ["new"], await revision(store), DRAIN_POLICY_FINISH)
    assert (done.instance_ids, done.revision) == (("old",), await revision(store))
    assert await states(store) == {"old": DRAINING, "new": READY}
    assert await epochs(store) == {"old": before["old"], "new": done.epoch}
    assert done.epoch > before["old"]
    policies = {entry.instance_id: entry.drain_policy for entry in await store.entries()}
    assert policies == {"old": DRAIN_POLICY_FINISH, "new": registry_pb2.DRAIN_POLICY_UNSPECIFIED}


async def test_a_swap_names_the_revision_it_expects_and_may_be_repeated(store: RegistryStore):
    await old_and_new(store)
    seen = await revision(store)
    await store.register(an_entry("else", "z", 3, slot="code"))
    error = await refused(store.swap("math", ["new"], seen))
    assert (error.reason, error.metadata["revision"]) == (Reason.REVISION_CONFLICT, str(seen + 1))
    assert await states(store) == {"old": READY, "new": STANDBY, "else": READY}
    first = await store.swap("math", ["new"], seen + 1)
    assert await store.swap("math", ["new"], seen + 1) == first  # the answer was lost
    assert (await refused(store.swap("math", ["old"], seen + 1))).reason is Reason.REVISION_CONFLICT


async def test_only_living_instances_of_the_slot_with_equal_weights_are_swapped_in(store: RegistryStore):
    await old_and_new(store)
    await store.register(an_entry("other", "b", 3, slot="code"), standby=True)
    await store.register(an_entry("leaving", "b", 4), standby=True)
    await store.heartbeat("leaving", common_pb2.Load(), draining=True)
    seen = await revision(store)
    for chosen, kind in (
        (["gone"], SessionStateError),
        (["other"], InvalidRequest),
        (["old", "new"], InvalidRequest),
        (["leaving"], Unavailable),
    ):
        assert isinstance(await refused(store.swap("math", chosen, seen)), kind), chosen
    assert await revision(store) == seen
    assert (await states(store))["old"] == READY


async def test_a_rollback_gives_the_slot_back_under_a_still_higher_epoch(store: RegistryStore):
    await old_and_new(store)
    swapped = await store.swap("math", ["new"], await revision(store))
    seen = await revision(store)
    back = await store.roll_back("math", seen)
    assert back.instance_ids == ("old",)
    assert back.epoch > swapped.epoch
    assert await states(store) == {"old": READY, "new": DRAINING}
    assert await epochs(store) == {"old": back.epoch, "new": swapped.epoch}
    assert await store.roll_back("math", seen) == back  # the answer was lost
    again = await refused(store.roll_back("math", await revision(store)))
    assert again.reason is Reason.NOTHING_TO_ROLL_BACK


async def test_nothing_is_rolled_back_once_the_retired_have_gone_or_are_leaving(store: RegistryStore):
    error = await refused(store.roll_back("math", 0))
    assert error.reason is Reason.NOTHING_TO_ROLL_BACK
    await old_and_new(store)
    await store.swap("math", ["new"], await revision(store))
    stale = await refused(store.roll_back("math", 1))
    assert stale.reason is Reason.REVISION_CONFLICT
    await store.heartbeat("old", common_pb2.Load(), draining=True)
    error = await refused(store.roll_back("math", await revision(store)))
    assert error.reason is Reason.NOTHING_TO_ROLL_BACK
    assert (await states(store))["new"] == READY


async def test_who_was_retired_drains_on_whatever_it_registers(store: RegistryStore):
    await old_and_new(store, weights="a")  # equal weights: nothing else tells them apart
    served = (await epochs(store))["old"]
    await store.swap("math", ["new"], await revision(store))
    await store.deregister("old")  # its lease has ended, say
    told = await store.register(an_entry("old", "a", 1))
    assert (told.state, told.epoch) == (DRAINING, served)


async def test_who_was_swapped_in_serves_on_although_it_registers_as_it_was_started(store: RegistryStore):
    await old_and_new(store)
    done = await store.swap("math", ["new"], await revision(store))
    await store.deregister("new")
    told = await store.register(an_entry("new", "b", 2), standby=True)
    assert (told.state, told.epoch) == (READY, done.epoch)
    await store.deregister("new")
    told = await store.register(an_entry("restarted", "b", 9, address="new:1"), standby=True)
    assert (told.state, told.epoch) == (READY, done.epoch)


async def test_a_retired_process_that_is_started_again_does_not_take_the_slot_back(store: RegistryStore):
    await old_and_new(store)
    await store.swap("math", ["new"], await revision(store))
    await store.deregister("old")
    told = await store.register(an_entry("old again", "a", 9, address="old:1"))
    assert told.state == DRAINING
    assert await states(store) == {"new": READY, "old again": DRAINING}


async def test_weights_loaded_later_take_the_slot_over_and_earlier_ones_drain(store: RegistryStore):
    first = await store.register(an_entry("one", "a", 10))
    second = await store.register(an_entry("two", "a", 12))
    assert second.epoch == first.epoch
    late = await store.register(an_entry("late", "b", 11))
    assert late.state == DRAINING
    assert 0 < late.epoch < first.epoch
    taken = await store.register(an_entry("newest", "c", 13))
    assert taken.state == READY
    assert taken.epoch > first.epoch
    assert await states(store) == {"one": DRAINING, "two": DRAINING, "late": DRAINING, "newest": READY}
    error = await refused(store.roll_back("math", await revision(store)))
    assert error.reason is Reason.NOTHING_TO_ROLL_BACK


async def test_weights_that_a_decision_knew_do_not_take_the_slot_by_registering_late(store: RegistryStore):
    await old_and_new(store)
    await store.register(an_entry("third", "c", 7), standby=True)
    await store.swap("math", ["new"], await revision(store))
    await store.deregister("third")
    assert (await store.register(an_entry("third", "c", 7))).state == DRAINING


async def test_a_reload_in_place_changes_the_epoch_only_with_the_weights(store: RegistryStore):
    first = await store.register(an_entry("a", "w", 5))
    same = await store.register(an_entry("a", "w", 6))
    assert (same.state, same.epoch) == (READY, first.epoch)
    other = await store.register(an_entry("a", "v", 7))
    assert other.state == READY
    assert other.epoch > first.epoch


async def test_instances_of_equal_weights_serve_side_by_side_under_one_epoch(store: RegistryStore):
    await old_and_new(store, weights="a")
    done = await store.swap("math", ["new", "old"], await revision(store))
    assert done.instance_ids == ()
    assert await epochs(store) == {"old": done.epoch, "new": done.epoch}
    assert set((await states(store)).values()) == {READY}


async def test_draining_keeps_its_policy_and_spares_those_on_standby(store: RegistryStore):
    await old_and_new(store)
    error = await refused(store.drain("new", await revision(store)))
    assert error.reason is Reason.INVALID_FIELD
    await store.drain("old", await revision(store), DRAIN_POLICY_FINISH)
    seen = await revision(store)
    assert await store.drain("old", 0, DRAIN_POLICY_FINISH) == seen
    assert await store.drain("old", seen, DRAIN_POLICY_MIGRATE) == seen + 1
    (old,) = [entry for entry in await store.entries() if entry.instance_id == "old"]
    assert (old.state, old.drain_policy) == (DRAINING, DRAIN_POLICY_MIGRATE)


NAMES = st.sampled_from(["a", "b", "c", "d"])
STEPS = st.one_of(
    st.tuples(st.just("register"), NAMES, st.sampled_from(["v", "w"]), st.booleans()),
    st.tuples(st.just("leave"), NAMES, st.just(""), st.just(False)),
    st.tuples(st.just("stopping"), NAMES, st.just(""), st.just(False)),
    st.tuples(st.just("drain"), NAMES, st.just(""), st.just(False)),
    st.tuples(st.just("swap"), NAMES, st.just(""), st.booleans()),
    st.tuples(st.just("rollback"), NAMES, st.just(""), st.booleans()),
)


class World:
    """One slot. What must hold after every step, whatever the steps were."""

    def __init__(self, store: RegistryStore) -> None:
        self.store = store
        self.loaded = 0
        self.highest = 0
        self.weights_of: dict[int, str] = {}

    async def step(self, verb: str, name: str, weights: str, flag: bool) -> None:
        seen = await revision(self.store)
        match verb:
            case "register":
                self.loaded += 1
                await self.store.register(an_entry(name, weights, self.loaded), standby=flag)
            case "leave":
                await self.store.deregister(name)
            case "stopping":
                await self.store.heartbeat(name, common_pb2.Load(), draining=True)
            case "drain":
                await self.store.drain(name, seen)
            case "swap":
                done = await self.store.swap("math", [name], seen)
                assert not flag or await self.store.swap("math", [name], seen) == done
                assert (await states(self.store))[name] == READY
            case "rollback":
                done = await self.store.roll_back("math", seen)
                assert not flag or await self.store.roll_back("math", seen) == done
                assert done.instance_ids

    def check(self, entries: Sequence[ExpertEntry]) -> None:
        serving = [entry for entry in entries if entry.state == READY]
        assert len({entry.model.weights_fingerprint for entry in serving}) <= 1
        assert len({entry.epoch for entry in serving}) <= 1
        for entry in entries:
            assert (entry.epoch == 0) == (entry.state == STANDBY)
            assert (entry.drain_policy != 0) == (entry.state == DRAINING)
        if serving:
            # Never back, and an epoch never comes to mean other weights.
            assert serving[0].epoch >= self.highest
            self.highest = serving[0].epoch
            weights = serving[0].model.weights_fingerprint
            assert self.weights_of.setdefault(self.highest, weights) == weights
        assert all(entry.epoch <= self.highest for entry in entries)


@settings(max_examples=40, deadline=None)
@given(steps=st.lists(STEPS, min_size=1, max_size=25))
def test_whatever_happens_the_epoch_of_a_slot_never_falls_and_names_one_set_of_weights(redis_url: str, steps):
    async def run() -> None:
        client = connect(redis_url)
        world = World(RegistryStore(client, namespace=uuid.uuid4().hex))
        for step in steps:
            try:
                await world.step(*step)
            except FusionRouteError as error:
                assert error.reason in (
                    Reason.LEASE_EXPIRED,
                    Reason.INVALID_FIELD,
                    Reason.NOTHING_TO_ROLL_BACK,
                    Reason.DRAINING,
                )
            world.check(await world.store.entries())
        await client.aclose()

    asyncio.run(run())
