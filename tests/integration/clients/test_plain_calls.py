"""The client in plain Python: the same answers as message for message, from streams that may be left and taken up."""

from __future__ import annotations

import asyncio
from contextlib import aclosing

import pytest

from fusionroute.answers import FinishReason
from fusionroute.client import RouterClient
from fusionroute.errors import InvalidRequest, Reason, SessionStateError
from fusionroute.v1.router_pb2 import COMBINE_RULE_MIXTURE, GenerateRequest, SamplingParameters
from tests.served_stack import SLOTS, Stack

pytestmark = pytest.mark.asyncio(loop_scope="package")
PROMPT = "w5 w9 w20"


async def test_a_completion_is_what_the_messages_say(stack: Stack) -> None:
    router = stack.client
    wanted = await stack.answer(
        GenerateRequest(
            text=PROMPT,
            combine=COMBINE_RULE_MIXTURE,
            sampling=SamplingParameters(
                max_tokens=12, temperature=1.5, seed=9, ignore_eos=True, stop=["w99"]
            ),
            num_top_candidates=3,
            return_routing_weights=True,
        )
    )
    got = await router.complete(
        PROMPT,
        combine="mixture",
        max_tokens=12,
        temperature=1.5,
        seed=9,
        ignore_eos=True,
        stop="w99",
        num_candidates=3,
        routing_weights=True,
    )
    assert [token.id for token in got.tokens] == wanted.ids
    assert got.text == wanted.text
    assert (got.finish_reason, got.stop, got.seed) == (FinishReason.LENGTH, None, 9)
    assert (got.combine, got.checkpoint) == ("mixture", wanted.started.checkpoint)
    assert got.num_prompt_tokens == 3
    assert got.statistics.num_router_forwards > 0
    for token, message in zip(got.tokens, wanted.tokens, strict=True):
        assert token.expert == (message.expert or None)
        assert token.routing_weights == pytest.approx(tuple(message.routing_weights), abs=1e-5)
        assert [each.id for each in token.top.fused] == [each.id for each in message.top.fused]


async def test_a_stream_is_the_completion_in_pieces(stack: Stack) -> None:
    whole = await stack.client.complete(PROMPT, max_tokens=10, ignore_eos=True)
    async with stack.client.stream(PROMPT, max_tokens=10, ignore_eos=True) as answer:
        tokens = [token async for token in answer]
    assert [token.id for token in tokens] == [token.id for token in whole.tokens]
    assert answer.text == answer.completion.text == whole.text


async def test_who_leaves_a_question_that_stands_for_itself_cancels_it(stack: Stack) -> None:
    async with stack.client.stream(PROMPT, max_tokens=80, ignore_eos=True) as answer:
        async for token in answer:
            if token.index == 2:
                break
    with pytest.raises(RuntimeError, match="not complete"):
        _ = answer.completion
    async with asyncio.timeout(10):
        while stack.router.keeper.num_running:
            await asyncio.sleep(0.01)
    stored = await stack.client.session(answer.session_id)
    assert stored.finish_reason is FinishReason.CANCELLED
    assert len(stored.token_ids) < 80


async def test_an_answer_of_a_session_goes_on_without_its_reader_and_is_taken_up_at_the_next_token(
    stack: Stack,
) -> None:
    whole = await stack.client.complete(PROMPT, max_tokens=60, ignore_eos=True)
    async with RouterClient.open(stack.client.address) as first:
        async with first.stream(PROMPT, max_tokens=60, ignore_eos=True, session_id="cut") as answer:
            async for token in answer:
                if token.index == 4:
                    break
        before = answer.text
    rest = await stack.client.follow("cut", from_token=5).read()
    assert rest.tokens[0].index == 5
    assert before + rest.text == whole.text
    stored = await stack.client.session("cut")
    assert (stored.state, stored.answer_text) == ("finished", whole.text)
    assert await stack.client.delete_session("cut")


async def test_a_running_answer_can_be_cancelled_and_ends_as_that(stack: Stack) -> None:
    async with stack.client.stream(PROMPT, max_tokens=90, ignore_eos=True, session_id="stopped") as answer:
        async for token in answer:
            if token.index == 1:
                await answer.cancel()
    assert answer.completion.finish_reason is FinishReason.CANCELLED
    assert len(answer.completion.tokens) < 90


async def test_scores_are_what_the_tokens_were_worth_when_they_were_written(stack: Stack) -> None:
    written = await stack.client.complete([5, 9, 20], max_tokens=8, ignore_eos=True)
    ids = [5, 9, 20, *(token.id for token in written.tokens)]
    scored = await stack.client.score(ids, from_position=3)
    assert [token.position for token in scored] == list(range(3, 11))
    for token, before in zip(scored, written.tokens, strict=True):
        assert (token.id, token.expert) == (before.id, before.expert)
        assert token.logprob == pytest.approx(before.logprob, abs=1e-4)


async def test_experts_are_named_with_their_state(stack: Stack) -> None:
    experts = await stack.client.experts()
    assert [expert.slot for expert in experts] == sorted(SLOTS)
    assert {expert.state for expert in experts} == {"ready"}
    epochs = {expert.slot: expert.epoch for expert in experts}
    completion = await stack.client.complete(PROMPT, max_tokens=6)
    assert {
        token.expert: token.expert_epoch for token in completion.tokens if token.expert
    }.items() <= epochs.items()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"combine": "product"}, "combine = 'product' is not allowed: sum, gated_sum"),
        ({"temprature": 1.0}, "temprature = 1.0 is not allowed: there is no such option"),
        ({"max_tokens": -1}, "max_tokens = -1"),
        ({"regex": "a", "json_schema": {}}, "one of json_schema, regex, grammar"),
        ({"logit_bias": {-4: 1.0}}, "logit_bias"),
        ({"expert": 3}, "expert = 3"),
    ],
)
async def test_an_option_that_cannot_be_is_refused_before_anything_is_sent(
    stack: Stack, options: dict, message: str
) -> None:
    with pytest.raises(InvalidRequest, match=message):
        stack.client.stream(PROMPT, **options)


async def test_errors_are_as_the_router_means_them(stack: Stack) -> None:
    with pytest.raises(InvalidRequest, match="temperature = -1") as refused:
        await stack.client.complete(PROMPT, temperature=-1.0)
    assert refused.value.reason is Reason.INVALID_FIELD
    with pytest.raises(InvalidRequest, match="role and content"):
        await stack.client.chat([{"role": "user", "words": "hello"}])
    with pytest.raises(SessionStateError) as unknown:
        await stack.client.session("never")
    assert unknown.value.reason is Reason.SESSION_UNKNOWN
    async with aclosing(stack.client.follow("never")) as answer:
        with pytest.raises(SessionStateError):
            await anext(aiter(answer))
