"""The registry: leases, revisions, admission, and all of it over gRPC."""

import asyncio
import uuid
from collections.abc import AsyncIterator

import grpc
import pytest
from redis.asyncio import Redis

from fusionroute.errors import FusionRouteError, InvalidRequest, ModelRejected, Reason, SessionStateError
from fusionroute.grpc_runtime import Service, channel, error_from_rpc, server
from fusionroute.v1 import common_pb2, registry_pb2, registry_pb2_grpc
from router_service.registry_servicer import RegistryServicer
from router_service.registry_store import RegistryStore

MODEL = common_pb2.ModelIdentity(name="tiny", tokenizer_fingerprint="good", logits_width=65, epoch=3)
LEASE_SECONDS = 0.15


def an_entry(instance_id: str, *, slot: str = "math", address: str = "") -> registry_pb2.ExpertEntry:
    return registry_pb2.ExpertEntry(
        instance_id=instance_id, slot=slot, address=address or f"{instance_id}:50061", model=MODEL
    )


@pytest.fixture
def namespace() -> str:
    return uuid.uuid4().hex


@pytest.fixture
def store(redis_client: Redis, namespace: str) -> RegistryStore:
    return RegistryStore(redis_client, namespace=namespace)


@pytest.fixture
def short(redis_client: Redis, namespace: str) -> RegistryStore:
    """The same registry with leases that end soon."""
    return RegistryStore(redis_client, namespace=namespace, lease_seconds=LEASE_SECONDS)


async def names(store: RegistryStore) -> list[str]:
    return [entry.instance_id for entry in (await store.list()).entries]


async def test_a_registered_instance_is_listed_as_it_was_told(store: RegistryStore):
    assert (await store.list()).entries == ()
    revision = (await store.register(an_entry("a"))).revision
    listing = await store.list()
    assert listing.revision == revision
    (entry,) = listing.entries
    assert (entry.slot, entry.address, entry.model) == ("math", "a:50061", MODEL)
    assert entry.state == registry_pb2.EXPERT_STATE_READY
    assert entry.lease_remaining_seconds == pytest.approx(10, abs=1)


async def test_entries_come_by_slot_and_then_by_instance(store: RegistryStore):
    for instance, slot in [("z", "code"), ("b", "math"), ("a", "math"), ("y", "code")]:
        await store.register(an_entry(instance, slot=slot))
    assert await names(store) == ["y", "z", "a", "b"]


async def test_heartbeats_keep_an_instance_and_its_load_but_raise_no_revision(short: RegistryStore):
    revision = (await short.register(an_entry("a"))).revision
    for queue_depth in range(5):
        await asyncio.sleep(LEASE_SECONDS / 2)
        state = await short.heartbeat("a", common_pb2.Load(queue_depth=queue_depth))
        assert state == registry_pb2.EXPERT_STATE_READY
    listing = await short.list()
    assert (listing.revision, listing.entries[0].load.queue_depth) == (revision, 4)


async def test_a_silent_instance_vanishes_and_raises_the_revision_once(short: RegistryStore):
    revision = (await short.register(an_entry("a"))).revision
    await asyncio.sleep(LEASE_SECONDS * 1.3)
    assert (await short.list()).entries == ()
    assert (await short.list()).revision == revision + 1
    with pytest.raises(SessionStateError) as caught:
        await short.heartbeat("a", common_pb2.Load())
    assert caught.value.reason is Reason.LEASE_EXPIRED


async def test_registering_again_unchanged_renews_and_raises_no_revision(short: RegistryStore):
    revision = (await short.register(an_entry("a"))).revision
    for _ in range(4):
        await asyncio.sleep(LEASE_SECONDS / 2)
        assert (await short.register(an_entry("a"))).revision == revision
    assert await names(short) == ["a"]


async def test_registering_again_with_another_model_raises_the_revision(store: RegistryStore):
    revision = (await store.register(an_entry("a"))).revision
    changed = an_entry("a")
    changed.model.epoch += 1
    assert (await store.register(changed)).revision == revision + 1
    assert (await store.list()).entries[0].model.epoch == 4


async def test_a_new_instance_at_an_address_replaces_the_old_one(store: RegistryStore):
    await store.register(an_entry("old", address="host:1"))
    await store.register(an_entry("bystander", address="host:2"))
    await store.register(an_entry("new", address="host:1"))
    assert await names(store) == ["bystander", "new"]


async def test_a_deregistered_instance_is_gone_at_once(store: RegistryStore):
    revision = (await store.register(an_entry("a"))).revision
    assert await store.deregister("a")
    assert not await store.deregister("a")
    listing = await store.list()
    assert (listing.entries, listing.revision) == ((), revision + 1)


async def test_draining_names_the_revision_it_expects(store: RegistryStore):
    seen = (await store.register(an_entry("a"))).revision
    await store.register(an_entry("b"))
    with pytest.raises(SessionStateError) as caught:
        await store.drain("a", seen)
    assert caught.value.reason is Reason.REVISION_CONFLICT
    assert caught.value.metadata["revision"] == str(seen + 1)
    assert await store.drain("a", seen + 1) == seen + 2
    assert await store.drain("a", seen + 1) == seen + 2  # the same call, repeated
    states = {entry.instance_id: entry.state for entry in (await store.list()).entries}
    assert states == {"a": registry_pb2.EXPERT_STATE_DRAINING, "b": registry_pb2.EXPERT_STATE_READY}
    assert await store.heartbeat("a", common_pb2.Load()) == registry_pb2.EXPERT_STATE_DRAINING


async def test_draining_what_does_not_live_is_told(store: RegistryStore):
    with pytest.raises(SessionStateError) as caught:
        await store.drain("a", 0)
    assert caught.value.reason is Reason.LEASE_EXPIRED


async def test_an_instance_about_to_stop_drains_by_its_heartbeat(store: RegistryStore):
    revision = (await store.register(an_entry("a"))).revision
    for _ in range(2):
        state = await store.heartbeat("a", common_pb2.Load(), draining=True)
        assert state == registry_pb2.EXPERT_STATE_DRAINING
    assert (await store.list()).revision == revision + 1
    assert (await store.register(an_entry("a"))).revision == revision + 1
    assert (await store.list()).entries[0].state == registry_pb2.EXPERT_STATE_DRAINING


async def test_revisions_grow_over_the_loss_of_everything(
    store: RegistryStore, redis_client: Redis, namespace: str
):
    before = (await store.register(an_entry("a"))).revision
    await redis_client.delete(
        *[key async for key in redis_client.scan_iter(f"fr:registry:{{{namespace}}}:*")]
    )
    assert await names(store) == []
    await asyncio.sleep(1.1)  # revisions start at the clock's seconds
    assert (await store.register(an_entry("a"))).revision > before


async def test_registries_of_different_names_share_nothing(store: RegistryStore, redis_client: Redis):
    await store.register(an_entry("a"))
    assert await names(RegistryStore(redis_client, namespace=uuid.uuid4().hex)) == []


async def test_every_key_has_a_time_to_live(store: RegistryStore, redis_client: Redis, namespace: str):
    await store.register(an_entry("a"))
    await store.heartbeat("a", common_pb2.Load(queue_depth=1))
    keys = [key async for key in redis_client.scan_iter(f"fr:registry:{{{namespace}}}:*")]
    assert len(keys) == 7
    assert all([await redis_client.pttl(key) > 0 for key in keys])


async def test_watchers_see_the_state_now_and_each_change(short: RegistryStore):
    await short.register(an_entry("a"))
    seen = []
    async with asyncio.timeout(10):
        async for listing in short.watch(poll_seconds=0.01):
            seen.append([entry.instance_id for entry in listing.entries])
            if len(seen) == 1:
                await short.register(an_entry("b"))
            if not listing.entries:
                break
    assert seen[0] == ["a"]
    assert ["a", "b"] in seen
    assert seen[-1] == []  # nobody renewed


def admit(slot: str, model: common_pb2.ModelIdentity) -> None:
    """A checkpoint with the slots math and code and the vocabulary "good"."""
    if slot not in ("math", "code"):
        raise InvalidRequest(Reason.UNKNOWN_SLOT, f"slot = {slot!r} is not one of math, code")
    if model.tokenizer_fingerprint != "good":
        message = f"tokenizer_fingerprint is {model.tokenizer_fingerprint}, the checkpoint's is good"
        raise ModelRejected(Reason.VOCABULARY_MISMATCH, message)


@pytest.fixture
async def registry(short: RegistryStore) -> AsyncIterator["registry_pb2_grpc.RegistryServiceAsyncStub"]:
    servicer = RegistryServicer(short, admit, poll_seconds=0.01)
    name = registry_pb2.DESCRIPTOR.services_by_name["RegistryService"].full_name
    service = Service(name, lambda s: registry_pb2_grpc.add_RegistryServiceServicer_to_server(servicer, s))
    async with server([service], stop_grace_seconds=0.1) as running, channel(running.address) as connection:
        yield registry_pb2_grpc.RegistryServiceStub(connection)


def a_request(**changes: object) -> registry_pb2.RegisterExpertRequest:
    fields = {"instance_id": "a", "slot": "math", "address": "127.0.0.1:50061", "model": MODEL} | changes
    return registry_pb2.RegisterExpertRequest(**fields)  # type: ignore[arg-type]


async def refusal_of(call: grpc.aio.UnaryUnaryCall) -> FusionRouteError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return error_from_rpc(caught.value)


async def test_an_expert_lives_its_whole_life_over_grpc(registry):
    granted = await registry.RegisterExpert(a_request())
    assert granted.lease_seconds == pytest.approx(LEASE_SECONDS)
    renewed = await registry.Heartbeat(
        registry_pb2.HeartbeatRequest(instance_id="a", load=common_pb2.Load(num_sessions=2))
    )
    assert renewed.state == registry_pb2.EXPERT_STATE_READY
    listing = await registry.ListExperts(registry_pb2.ListExpertsRequest())
    assert (listing.revision, listing.experts[0].load.num_sessions) == (granted.revision, 2)
    drained = await registry.DrainExpert(
        registry_pb2.DrainExpertRequest(instance_id="a", expected_revision=listing.revision)
    )
    assert drained.revision == listing.revision + 1
    gone = await registry.DeregisterExpert(registry_pb2.DeregisterExpertRequest(instance_id="a"))
    assert gone.existed


async def test_watching_over_grpc_follows_changes(registry):
    stream = registry.WatchExperts(registry_pb2.WatchExpertsRequest())
    first = await stream.read()
    assert list(first.experts) == []
    await registry.RegisterExpert(a_request())
    second = await stream.read()
    assert [entry.instance_id for entry in second.experts] == ["a"]
    third = await stream.read()
    assert (list(third.experts), third.revision) == ([], second.revision + 1)
    stream.cancel()


async def test_a_wrong_vocabulary_is_refused_and_not_entered(registry):
    wrong = common_pb2.ModelIdentity(tokenizer_fingerprint="bad")
    error = await refusal_of(registry.RegisterExpert(a_request(model=wrong)))
    assert error.reason is Reason.VOCABULARY_MISMATCH
    assert "bad" in error.message and "good" in error.message
    listing = await registry.ListExperts(registry_pb2.ListExpertsRequest())
    assert list(listing.experts) == []


async def test_an_unknown_slot_is_refused(registry):
    error = await refusal_of(registry.RegisterExpert(a_request(slot="cooking")))
    assert error.reason is Reason.UNKNOWN_SLOT


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("instance_id", ""),
        ("instance_id", "a b"),
        ("slot", ""),
        ("slot", "Math"),
        ("slot", "x" * 33),
        ("address", "host"),
        ("address", ":50061"),
        ("address", "host:0"),
        ("address", "host:65536"),
        ("address", "::1:50061"),
        ("model", None),
    ],
)
async def test_a_malformed_registration_names_its_field(registry, field, value):
    error = await refusal_of(registry.RegisterExpert(a_request(**{field: value})))
    assert error.reason is Reason.INVALID_FIELD
    assert error.metadata["field"] == field


@pytest.mark.parametrize("address", ["[::1]:50061", "expert-1.local:1", "10.0.0.7:65535"])
async def test_addresses_of_every_kind_are_taken(registry, address):
    await registry.RegisterExpert(a_request(address=address))


async def test_a_heartbeat_after_the_lease_asks_for_a_new_registration(registry):
    error = await refusal_of(registry.Heartbeat(registry_pb2.HeartbeatRequest(instance_id="a")))
    assert error.reason is Reason.LEASE_EXPIRED
