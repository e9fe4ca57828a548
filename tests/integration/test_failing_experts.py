"""Experts that hang, vanish, drain or are slow: sessions go on with a replica, or wait, and the text is the same."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager
from typing import Any

import pytest

from fusionroute.v1 import registry_pb2, router_pb2
from fusionroute.v1.router_pb2 import GenerateRequest, GenerationEvent
from router_service.experts import Directory
from router_service.instance_choice import Standing
from router_service.session_text import Text
from tests.expert_fakes import until
from tests.served_stack import Answer, Family, Stack, make_family, served

REPLICAS = ("math-a", "math-b")
NUM_TOKENS = 40


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Family:
    return make_family(tmp_path_factory.mktemp("family"), ("math",), gates=False)


def ask(num_tokens: int = NUM_TOKENS, **changes: Any) -> GenerateRequest:
    sampling = {"max_tokens": num_tokens, "ignore_eos": True, "temperature": 1.0, "seed": 3}
    return GenerateRequest(token_ids={"ids": [5, 9, 11, 3]}, sampling=sampling, **changes)


@asynccontextmanager
async def replicated(family: Family, **router: Any) -> AsyncIterator[Stack]:
    """Two instances of the only slot, each over a link."""
    async with served(family, start=False, **router) as stack:
        for name in REPLICAS:
            await stack.start_expert("math", name, linked=True)
        yield stack


async def with_event_at(
    stack: Stack, request: GenerateRequest, index: int, event: Callable[[], Awaitable[None]]
) -> Answer:
    """The answer to a request; something happens when the token `index` has come."""

    async def events() -> AsyncIterator[GenerationEvent]:
        async with aclosing(stack.client.generate(request, 60)) as stream:
            async for each in stream:
                yield each
                if each.WhichOneof("event") == "token" and each.token.index == index:
                    await event()

    return await Answer.read(events())


async def home(stack: Stack, session_id: str) -> str:
    """The replica that has cached most of a session."""
    lengths = dict.fromkeys(REPLICAS, 0)
    for name in REPLICAS:
        for view in (await stack.engines[name].list_sessions(100))[0]:
            if view.session_id == session_id:
                lengths[name] = view.cached_length
    return max(REPLICAS, key=lambda name: lengths[name])


async def test_an_expert_that_hangs_is_survived_with_a_replica(family: Family) -> None:
    # An early ask that times out is no retry: the replica is asked in its place.
    async with replicated(family, expert_attempt_seconds=0.5, early_asks="off") as stack:
        undisturbed = await stack.answer(ask())

        async def hang() -> None:
            stack.links[await home(stack, "s")].cut()

        answer = await with_event_at(stack, ask(session_id="s"), 10, hang)
        assert answer.ids == undisturbed.ids
        assert answer.finished is not None
        statistics = answer.finished.statistics
        assert (statistics.num_retries, statistics.num_replays) == (1, 1)
        assert statistics.num_degraded_tokens == 0
        assert len({token.expert_epoch for token in answer.tokens}) == 1
        again = await stack.answer(ask())  # the breaker keeps new sessions from trying it
        assert again.ids == undisturbed.ids
        assert again.finished is not None and again.finished.statistics.num_retries == 0


async def test_a_session_sticks_to_its_instance_and_further_turns_return_to_it(family: Family) -> None:
    async with replicated(family) as stack:
        for number in range(5):
            before = {name: stack.engines[name].load().num_forwards for name in REPLICAS}
            for turn in range(3):
                await stack.answer(ask(6, session_id=f"s{number}", request_id=f"r{turn}"))
            after = {name: stack.engines[name].load().num_forwards for name in REPLICAS}
            assert min(after[name] - before[name] for name in REPLICAS) == 0


async def test_many_sessions_use_all_replicas(family: Family) -> None:
    async with replicated(family) as stack:
        await asyncio.gather(*(stack.answer(ask(6)) for _ in range(12)))
        assert all(stack.engines[name].load().num_forwards > 0 for name in REPLICAS)


async def test_an_expert_that_hangs_alone_is_waited_for(family: Family) -> None:
    async with served(family, start=False, expert_attempt_seconds=0.3) as stack:
        await stack.start_expert("math", linked=True)
        undisturbed = await stack.answer(ask())

        async def hang() -> None:
            stack.links["math"].cut()
            asyncio.get_running_loop().call_later(1.5, stack.links["math"].heal)

        answer = await with_event_at(stack, ask(), 10, hang)
        assert answer.ids == undisturbed.ids
        assert answer.finished is not None
        statistics = answer.finished.statistics
        assert statistics.num_retries >= 1
        assert statistics.total_seconds > 1.0


async def test_a_slow_expert_is_not_broken_off_for_ever(family: Family) -> None:
    """Each answer takes longer than the first attempt may; attempts grow until one is long enough."""
    async with served(family, start=False, expert_attempt_seconds=0.3) as stack:
        await stack.start_expert("math", linked=True)
        undisturbed = await stack.answer(ask())
        stack.links["math"].base_delay_seconds = 0.25  # twice a call
        answer = await stack.answer(ask(2))
        assert answer.ids == undisturbed.ids[:2]
        assert answer.finished is not None and answer.finished.statistics.num_retries >= 1


@pytest.mark.parametrize("policy", ["MIGRATE", "FINISH"])
async def test_a_draining_expert_is_left_or_kept_as_its_policy_says(family: Family, policy: str) -> None:
    async with replicated(family) as stack:
        undisturbed = await stack.answer(ask())
        drained = []

        async def drain() -> None:
            drained.append(await home(stack, "s"))
            experts = await stack.client.list_experts()
            address = stack.links[drained[0]].address
            entry = next(each for each in experts if each.address == address)
            await drain_expert(stack, entry.instance_id, policy)
            instance = stack.router.directory.instances[entry.instance_id]
            await until(lambda: not instance.is_ready)

        for link in stack.links.values():
            link.base_delay_seconds = 0.03  # the turn must outlast the news of the drain
        answer = await with_event_at(stack, ask(session_id="s"), 2, drain)
        assert answer.ids == undisturbed.ids
        assert answer.finished is not None
        statistics = answer.finished.statistics
        assert (statistics.num_replays, statistics.num_retries) == (int(policy == "MIGRATE"), 0)
        for turn in ("new session", "further turn"):
            session_id = "s" if turn == "further turn" else "t"
            before = stack.engines[drained[0]].load().num_forwards
            await stack.answer(ask(8, session_id=session_id))
            assert stack.engines[drained[0]].load().num_forwards == before, turn


async def drain_expert(stack: Stack, instance_id: str, policy: str) -> None:
    from fusionroute.grpc_runtime import channel
    from fusionroute.v1 import registry_pb2_grpc

    async with channel(stack.router.server.address) as connection:
        registry = registry_pb2_grpc.RegistryServiceStub(connection)
        listing = await registry.ListExperts(registry_pb2.ListExpertsRequest(), timeout=10)
        request = registry_pb2.DrainExpertRequest(
            instance_id=instance_id,
            expected_revision=listing.revision,
            policy=registry_pb2.DrainPolicy.Value(f"DRAIN_POLICY_{policy}"),
        )
        await registry.DrainExpert(request, timeout=10)


async def test_hedging_asks_a_replica_when_the_first_one_is_slow(family: Family) -> None:
    async with replicated(family, hedge_after_seconds=0.15) as stack:
        undisturbed = await stack.answer(ask())

        async def slow() -> None:
            stack.links[await home(stack, "s")].base_delay_seconds = 3.0

        answer = await with_event_at(stack, ask(session_id="s"), 10, slow)
        assert answer.ids == undisturbed.ids
        assert answer.finished is not None
        statistics = answer.finished.statistics
        assert (statistics.num_replays, statistics.num_retries) == (1, 0)


async def test_experts_that_the_registry_forgets_serve_on_for_a_lease(family: Family) -> None:
    async with served(family) as stack:
        entries = list(await stack.client.list_experts())
        listed = list(entries)

        async def list_entries() -> list[registry_pb2.ExpertEntry]:
            return listed

        directory, text = Directory(list_entries, lease_seconds=0.5), Text("s", 1, [1, 2])
        await directory.refresh()
        listed.clear()
        await directory.refresh()
        instance = directory.choose("math", text)
        assert instance is not None and instance.standing is Standing.VANISHED
        assert directory.best("math") is None  # nobody is told that it is served
        listed.extend(entries)
        await directory.refresh()
        assert directory.choose("math", text) is instance
        assert instance.is_ready
        listed.clear()
        await directory.refresh()
        await asyncio.sleep(0.6)
        await directory.refresh()
        assert directory.choose("math", text) is None


async def test_an_expert_that_said_goodbye_is_no_last_resort() -> None:
    entry = registry_pb2.ExpertEntry(instance_id="i", slot="math", address="127.0.0.1:9")
    entry.state = registry_pb2.EXPERT_STATE_DRAINING
    listed = [entry]

    async def list_entries() -> list[registry_pb2.ExpertEntry]:
        return listed

    directory = Directory(list_entries)
    await directory.refresh()
    listed.clear()
    await directory.refresh()
    assert not directory.instances


async def test_nobody_is_asked_below_an_epoch_that_the_turn_has_used() -> None:
    def entry(number: int, epoch: int, state: int) -> registry_pb2.ExpertEntry:
        return registry_pb2.ExpertEntry(
            instance_id=f"i{number}", slot="math", address=f"127.0.0.1:{number}", epoch=epoch, state=state
        )

    listed = [entry(1, 4, registry_pb2.EXPERT_STATE_DRAINING), entry(2, 5, registry_pb2.EXPERT_STATE_READY)]

    async def list_entries() -> list[registry_pb2.ExpertEntry]:
        return listed

    directory, text = Directory(list_entries), Text("s", 1, [1, 2])
    async with directory.running():
        await until(lambda: len(directory.instances) == 2)
        new = directory.choose("math", text)
        assert new is not None and new.epoch == 5
        text.answered("math", new.name, new.epoch)
        listed.pop()
        listed.append(entry(2, 5, registry_pb2.EXPERT_STATE_STANDBY))
        await directory.refresh()
        assert directory.choose("math", text) is None
        assert directory.absent_seconds("math", text) >= 0.0
        assert not directory.can_be_asked("math", text)
        fresh = directory.choose("math", Text("t", 1, [1]))
        assert fresh is not None and fresh.epoch == 4
        with pytest.raises(Exception, match="of 2 known instances none can be asked"):
            await directory.locate("math", text, 0.0)


def test_the_policies_of_the_contract_are_all_served() -> None:
    from router_service.turn_request import POLICY_MESSAGES

    named = {router_pb2.OnExpertUnavailable.Name(number) for number in POLICY_MESSAGES.values()}
    assert named == set(router_pb2.OnExpertUnavailable.keys()) - {"ON_EXPERT_UNAVAILABLE_UNSPECIFIED"}
