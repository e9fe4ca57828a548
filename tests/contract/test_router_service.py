"""RouterService over real gRPC: what a turn streams, and where it ends."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from fusionroute.fusion import Sampling
from fusionroute.v1 import router_pb2
from fusionroute.v1.router_pb2 import GenerateRequest
from tests.router_requests import PROMPT, ask
from tests.served_stack import SLOTS, Family, Stack, served
from tests.tiny_models import MAX_CONTEXT

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def stack(family: Family) -> AsyncIterator[Stack]:
    """One for all: these tests leave nothing behind that another would see."""
    async with served(family, early_asks="off") as running:
        yield running


async def test_a_turn_streams_started_tokens_finished_with_usage_and_costs(stack: Stack) -> None:
    answer = await stack.answer(ask(8, return_routing_weights=True, num_top_candidates=3))
    assert answer.started.num_prompt_tokens == len(PROMPT)
    assert answer.started.combine == router_pb2.COMBINE_RULE_SUM
    assert [token.index for token in answer.tokens] == list(range(8))
    for token in answer.tokens:
        assert token.expert in SLOTS
        serving = stack.router.directory.best(token.expert)
        assert serving is not None
        assert token.expert_epoch == serving.entry.epoch > serving.entry.model.epoch
        assert len(token.routing_weights) == 3
        assert sum(token.routing_weights) == pytest.approx(1.0)
        assert token.routing_weights[SLOTS.index(token.expert)] == max(token.routing_weights)
        assert token.top.fused[0].id == token.id
        assert token.top.fused[0].logprob == pytest.approx(token.logprob, abs=1e-5)
        assert len(token.top.expert) == len(token.top.router) == 3
    assert answer.finished is not None
    assert answer.finished.reason == router_pb2.FINISH_REASON_LENGTH
    assert (answer.finished.num_prompt_tokens, answer.finished.num_generated_tokens) == (4, 8)
    costs = answer.finished.statistics
    assert (costs.num_router_forwards, costs.num_expert_calls, costs.num_replays) == (8, 8, 0)
    parts = costs.router_seconds + costs.expert_seconds + costs.fuse_seconds + costs.store_seconds
    assert 0 < costs.first_token_seconds <= costs.total_seconds
    assert 0 < parts <= costs.total_seconds
    assert 0 < costs.expert_forward_seconds <= costs.expert_seconds


async def test_details_that_nobody_asked_for_are_not_sent(stack: Stack) -> None:
    answer = await stack.answer(ask(2))
    assert not answer.tokens[0].routing_weights
    assert not answer.tokens[0].HasField("top")


async def test_the_served_route_is_the_models_route(stack: Stack, family: Family) -> None:
    """The expert of every token is the one with the largest weight, and no other was asked for it."""
    answer = await stack.answer(ask(20))
    reference = family.reference()
    wanted = reference.write(PROMPT, "sum", Sampling(logit_bias={1: 0.0}), 20)
    names = [SLOTS[token.expert] for token in wanted if token.expert is not None]
    assert [token.expert for token in answer.tokens][: len(names)] == names


async def test_rules_that_need_no_expert_or_no_router_call_none(stack: Stack) -> None:
    alone = await stack.answer(ask(5, combine=router_pb2.COMBINE_RULE_ROUTER))
    assert alone.finished is not None
    assert alone.finished.statistics.num_expert_calls == 0
    assert {token.expert for token in alone.tokens} == {""}
    fixed = await stack.answer(ask(5, combine=router_pb2.COMBINE_RULE_ROUTE, fixed_expert="strings"))
    assert fixed.finished is not None
    assert fixed.finished.statistics.num_router_forwards == 0
    assert {token.expert for token in fixed.tokens} == {"strings"}
    by_experts = []
    for start in range(6):
        select = await stack.answer(
            ask(10, prompt=[10 + 7 * start, 3], combine=router_pb2.COMBINE_RULE_SELECT)
        )
        assert select.finished is not None
        by_experts.append(sum(token.expert != "" for token in select.tokens))
        assert select.finished.statistics.num_expert_calls == by_experts[-1]
    assert 0 < sum(by_experts) < 60


async def test_a_drawn_seed_is_told_and_repeats_the_answer(stack: Stack) -> None:
    first = await stack.answer(ask(12, sampling={"temperature": 1.5}))
    again = await stack.answer(ask(12, sampling={"temperature": 1.5, "seed": first.started.seed}))
    other = await stack.answer(ask(12, sampling={"temperature": 1.5, "seed": first.started.seed ^ 1}))
    assert first.ids == again.ids != other.ids


async def test_stop_strings_end_the_answer_before_them(stack: Stack) -> None:
    whole = await stack.answer(ask(20))
    words = whole.text.split(" ")
    stop = f"{words[5]} {words[6]}"
    answer = await stack.answer(ask(20, sampling={"stop": [stop, "never"]}))
    assert answer.finished is not None
    assert answer.finished.reason == router_pb2.FINISH_REASON_STOP
    assert answer.finished.stop == stop
    assert answer.text == whole.text[: whole.text.index(stop)]
    assert answer.ids == whole.ids[: len(answer.ids)]
    resumed = await stack.resume(answer.started.session_id)
    assert (resumed.text, resumed.finished.stop if resumed.finished else "") == (answer.text, stop)


async def test_the_end_token_ends_an_answer_unless_ignored(stack: Stack) -> None:
    bias = {"logit_bias": {1: 100.0}}
    ended = await stack.answer(ask(5, sampling=bias | {"ignore_eos": False}))
    assert ended.ids == [1]
    assert ended.finished is not None
    assert ended.finished.reason == router_pb2.FINISH_REASON_EOS
    assert ended.text == ""
    assert (await stack.answer(ask(5, sampling=bias))).ids == [1] * 5


async def test_a_full_context_ends_the_answer(stack: Stack) -> None:
    answer = await stack.answer(ask(500))
    assert answer.finished is not None
    assert answer.finished.reason == router_pb2.FINISH_REASON_CONTEXT
    assert len(PROMPT) + len(answer.ids) == MAX_CONTEXT


async def test_text_prompts_are_encoded_by_the_checkpoints_tokenizer(stack: Stack) -> None:
    text = GenerateRequest(text="w5 w9 w11 w3", sampling={"max_tokens": 5, "ignore_eos": True})
    assert (await stack.answer(text)).ids == (await stack.answer(ask(5))).ids
