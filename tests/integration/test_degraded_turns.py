"""Turns whose expert is not there: what each policy makes of them, and that they say so."""

from __future__ import annotations

from contextlib import aclosing
from typing import Any

import pytest

from fusionroute.errors import FusionRouteError, Reason
from fusionroute.v1 import router_pb2
from fusionroute.v1.router_pb2 import GenerateRequest
from tests.served_stack import SLOTS, Answer, Family, Stack, make_family, served

NUM_TOKENS = 24
NEXT_BEST = "ON_EXPERT_UNAVAILABLE_NEXT_BEST"
ROUTER_ONLY = "ON_EXPERT_UNAVAILABLE_ROUTER_ONLY"
FAIL = "ON_EXPERT_UNAVAILABLE_FAIL"


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Family:
    return make_family(tmp_path_factory.mktemp("family"))


def ask(policy: str = "ON_EXPERT_UNAVAILABLE_UNSPECIFIED", **changes: Any) -> GenerateRequest:
    sampling = {"max_tokens": NUM_TOKENS, "ignore_eos": True, "temperature": 1.0, "seed": 4}
    return GenerateRequest(
        token_ids={"ids": [5, 9, 11, 3]},
        sampling=sampling,
        on_expert_unavailable=policy,
        return_routing_weights=True,
        **changes,
    )


async def most_used(stack: Stack) -> str:
    """The slot that most tokens of the undisturbed answer are routed to."""
    answer = await stack.answer(ask())
    experts = [token.expert for token in answer.tokens]
    assert len(set(experts)) > 1, "the answer must need several experts"
    return max(SLOTS, key=experts.count)


def by_weight(weights: Any) -> list[str]:
    """Slots, the heaviest first."""
    return [slot for _, slot in sorted(zip(weights, SLOTS, strict=True), key=lambda pair: -pair[0])]


def num_degraded(answer: Answer) -> int:
    assert answer.finished is not None
    number = sum(token.degraded for token in answer.tokens)
    assert answer.finished.statistics.num_degraded_tokens == number
    return number


async def test_next_best_asks_the_expert_with_the_next_weight_and_says_so(family: Family) -> None:
    async with served(family, degrade_after_seconds=2.0) as stack:
        missing = await most_used(stack)
        await stack.stop_expert(missing)
        answer = await stack.answer(ask(NEXT_BEST, session_id="s"))
        assert answer.started.on_expert_unavailable == router_pb2.ON_EXPERT_UNAVAILABLE_NEXT_BEST
        for token in answer.tokens:
            first, second, _ = by_weight(token.routing_weights)
            wanted = second if first == missing else first
            assert (token.expert, token.degraded) == (wanted, first == missing)
            assert token.expert_epoch > 0
        assert 0 < num_degraded(answer) < NUM_TOKENS
        stored = await stack.resume("s")
        told = [(t.id, t.expert, t.expert_epoch, t.degraded) for t in answer.tokens]
        assert [(t.id, t.expert, t.expert_epoch, t.degraded) for t in stored.tokens] == told
        assert stored.started.on_expert_unavailable == router_pb2.ON_EXPERT_UNAVAILABLE_NEXT_BEST


async def test_next_best_waits_where_no_expert_is_there_at_all(family: Family) -> None:
    async with served(family, start=False, degrade_after_seconds=0.1, expert_timeout_seconds=1.5) as stack:
        with pytest.raises(FusionRouteError, match="nobody may stand in") as caught:
            await stack.answer(ask(NEXT_BEST))
        assert caught.value.reason is Reason.EXPERT_UNAVAILABLE
        assert caught.value.metadata["slot"] in SLOTS


@pytest.mark.parametrize("rule", ["MIXTURE", "SELECT"])
async def test_under_a_gate_the_router_is_the_next_best_where_no_expert_is_there(
    family: Family, rule: str
) -> None:
    async with served(family, start=False, degrade_after_seconds=0.1) as stack:
        answer = await stack.answer(ask(NEXT_BEST, combine=f"COMBINE_RULE_{rule}"))
        assert {token.expert for token in answer.tokens} == {""}
        picked = [max(token.routing_weights[:-1]) > token.routing_weights[-1] for token in answer.tokens]
        if rule == "SELECT":
            assert [token.degraded for token in answer.tokens] == picked
        assert num_degraded(answer) > 0


async def test_router_only_writes_what_the_rule_router_would(family: Family) -> None:
    async with served(family, start=False, degrade_after_seconds=0.1) as stack:
        alone = await stack.answer(ask(combine="COMBINE_RULE_ROUTER"))
        assert num_degraded(alone) == 0
        for fixed in ("", "math"):
            for rule in ("SUM", "ROUTE"):
                request = ask(ROUTER_ONLY, combine=f"COMBINE_RULE_{rule}", fixed_expert=fixed)
                answer = await stack.answer(request)
                assert answer.ids == alone.ids
                assert num_degraded(answer) == NUM_TOKENS
                assert {(token.expert, token.expert_epoch) for token in answer.tokens} == {("", 0)}


async def test_fail_ends_the_stream_and_resume_goes_on_when_the_expert_is_back(family: Family) -> None:
    async with served(family, degrade_after_seconds=2.0) as stack:
        undisturbed = await stack.answer(ask())
        missing = await most_used(stack)
        await stack.stop_expert(missing)
        ids = []
        with pytest.raises(FusionRouteError) as caught:
            async with aclosing(stack.client.generate(ask(FAIL, session_id="s"))) as events:
                async for event in events:
                    ids += [event.token.id] if event.WhichOneof("event") == "token" else []
        assert caught.value.reason is Reason.EXPERT_UNAVAILABLE
        assert caught.value.metadata["slot"] == missing
        assert ids == undisturbed.ids[: len(ids)]
        await stack.start_expert(missing)
        resumed = await stack.resume("s")
        assert resumed.ids == undisturbed.ids
        assert resumed.started.on_expert_unavailable == router_pb2.ON_EXPERT_UNAVAILABLE_FAIL
        assert num_degraded(resumed) == 0


async def test_the_routers_settings_decide_where_a_request_does_not(family: Family) -> None:
    router = {"on_expert_unavailable": "router_only", "degrade_after_seconds": 0.1}
    async with served(family, start=False, **router) as stack:
        info = await stack.client.info()
        assert info.default_on_expert_unavailable == router_pb2.ON_EXPERT_UNAVAILABLE_ROUTER_ONLY
        answer = await stack.answer(ask())
        assert answer.started.on_expert_unavailable == router_pb2.ON_EXPERT_UNAVAILABLE_ROUTER_ONLY
        assert num_degraded(answer) == NUM_TOKENS


async def test_a_hung_expert_is_waited_for_once_and_asked_again_when_it_is_back(family: Family) -> None:
    """Patience of three seconds for each of many tokens would take a minute or more."""
    async with served(family, start=False, degrade_after_seconds=3.0) as stack:
        for slot in SLOTS:
            await stack.start_expert(slot, linked=True)
        undisturbed = await stack.answer(ask())
        missing = await most_used(stack)
        stack.links[missing].cut()
        degraded = await stack.answer(ask(ROUTER_ONLY))
        assert degraded.finished is not None
        assert num_degraded(degraded) >= 5
        assert degraded.finished.statistics.expert_seconds < 3.0 * (num_degraded(degraded) - 1)
        stack.links[missing].heal()
        healed = await stack.answer(ask())
        assert healed.ids == undisturbed.ids
        assert num_degraded(await stack.answer(ask(ROUTER_ONLY))) == 0


async def test_an_expert_that_comes_back_in_mid_turn_takes_part_again(family: Family) -> None:
    async with served(family, start=False, degrade_after_seconds=2.0) as stack:
        for slot in SLOTS:
            await stack.start_expert(slot, linked=True)
        missing = await most_used(stack)
        await stack.stop_expert(missing)
        request = ask(NEXT_BEST)
        request.sampling.max_tokens = 80
        tokens = []
        async with aclosing(stack.client.generate(request, 100)) as events:
            async for event in events:
                if event.WhichOneof("event") == "token":
                    tokens.append(event.token)
                    if len(tokens) == 10:
                        for link in stack.links.values():
                            link.base_delay_seconds = 0.2  # the turn must not end meanwhile
                        await stack.start_expert(missing)
                        for link in stack.links.values():
                            link.base_delay_seconds = 0.0
        assert any(token.degraded for token in tokens[:10])
        assert not tokens[-1].degraded
        assert missing in {token.expert for token in tokens}
