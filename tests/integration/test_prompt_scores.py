"""Scores of a prompt: those that the same tokens had when they were generated, whatever the chunks."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing
from pathlib import Path

import numpy as np
import pytest
import pytest_asyncio

from fusionroute.errors import InvalidRequest, OutOfRoom
from fusionroute.fusion import CombineRule
from fusionroute.questions import score_request
from fusionroute.v1 import router_pb2
from fusionroute.v1.router_pb2 import GenerateRequest, PromptToken, SamplingParameters, ScorePromptRequest
from router_service.prompt_scoring import PromptScorer
from router_service.session_closing import SessionCloser
from router_service.turn_request import RULE_MESSAGES
from tests.served_stack import Stack, make_family, served

pytestmark = pytest.mark.asyncio(loop_scope="module")
PROMPT = [5, 9, 20, 33, 41, 7]
LENGTH = 40


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def stack(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Stack]:
    folder: Path = tmp_path_factory.mktemp("family")
    async with served(make_family(folder)) as stack:
        yield stack


async def scores(stack: Stack, request: ScorePromptRequest) -> list[PromptToken]:
    return [token async for token in stack.client.score_prompt(request)]


def generating(rule: str, *, exact: bool = False) -> GenerateRequest:
    return GenerateRequest(
        token_ids={"ids": PROMPT},
        sampling=SamplingParameters(max_tokens=LENGTH, ignore_eos=True),
        combine=RULE_MESSAGES[CombineRule(rule)],
        exact=exact,
        drafting=router_pb2.DRAFTING_OFF,
        num_top_candidates=2,
    )


@pytest.mark.parametrize("rule", ["sum", "gated_sum", "mixture", "select", "route", "router"])
@pytest.mark.parametrize("exact", [False, True])
async def test_a_generated_answer_scores_what_it_was_told_to_be_worth(
    stack: Stack, rule: str, exact: bool
) -> None:
    answer = await stack.answer(generating(rule, exact=exact))
    request = ScorePromptRequest(
        token_ids={"ids": [*PROMPT, *answer.ids]},
        combine=RULE_MESSAGES[CombineRule(rule)],
        exact=exact,
        num_top_candidates=2,
    )
    scored = await scores(stack, request)
    assert [token.position for token in scored] == list(range(len(PROMPT) + LENGTH))
    assert not scored[0].HasField("logprob") and all(token.HasField("logprob") for token in scored[1:])
    of_answer = scored[len(PROMPT) :]
    assert [token.id for token in of_answer] == answer.ids
    assert [token.expert for token in of_answer] == [token.expert for token in answer.tokens]
    told = [token.logprob for token in answer.tokens]
    if exact:
        assert [token.logprob for token in of_answer] == told
        assert [token.top for token in of_answer] == [token.top for token in answer.tokens]
    np.testing.assert_allclose([token.logprob for token in of_answer], told, atol=1e-4)


@pytest.mark.parametrize("chunk_tokens", [1, 3, 7])
async def test_chunks_change_nothing(stack: Stack, chunk_tokens: int) -> None:
    request = ScorePromptRequest(token_ids={"ids": [3 + (7 * n) % 50 for n in range(60)]}, exact=True)
    router = stack.router
    async with SessionCloser(router.served, router.directory).running() as closer:
        scorer = PromptScorer(router.served, router.keeper.admission, closer, lambda: False, chunk_tokens)
        responses = [response async for response in scorer.score(request)]
    assert max(len(response.tokens) for response in responses) == chunk_tokens
    tokens = [token for response in responses for token in response.tokens]
    assert tokens == await scores(stack, request)


async def test_from_position_leaves_out_what_is_before_it(stack: Stack) -> None:
    request = ScorePromptRequest(text="w5 w9 w20 w33 w41", exact=True)
    whole = await scores(stack, request)
    assert "".join(token.text for token in whole) == "w5 w9 w20 w33 w41"
    for position in (1, 3, 4):
        request.from_position = position
        assert await scores(stack, request) == whole[position:]
    request.from_position = 5
    with pytest.raises(InvalidRequest, match="from_position = 5"):
        await scores(stack, request)


async def test_a_prompt_costs_as_many_forwards_as_it_has_chunks(stack: Stack) -> None:
    before = stack.router.engine.load().num_forwards
    calls = {name: engine.load().num_forwards for name, engine in stack.engines.items()}
    await scores(stack, ScorePromptRequest(token_ids={"ids": [9 + n % 40 for n in range(80)]}))
    assert stack.router.engine.load().num_forwards - before <= 2
    assert all(engine.load().num_forwards - calls[name] <= 2 for name, engine in stack.engines.items())


async def test_nothing_is_left_behind_whether_it_ends_or_is_left(stack: Stack) -> None:
    request = ScorePromptRequest(token_ids={"ids": PROMPT * 8})
    await scores(stack, request)
    async with aclosing(stack.client.score_prompt(request)) as tokens:
        await anext(tokens)
    engines = [stack.router.engine, *stack.engines.values()]

    async def is_clean() -> bool:
        views = [view for engine in engines for view in (await engine.list_sessions(100))[0]]
        return not any(view.session_id.startswith("score:") for view in views)

    async with asyncio.timeout(10):
        while not await is_clean() or stack.router.keeper.admission.num_running:
            await asyncio.sleep(0.01)


async def test_what_a_turn_is_refused_for_a_prompt_is_too(stack: Stack) -> None:
    with pytest.raises(InvalidRequest, match="fixed_expert"):
        await scores(stack, ScorePromptRequest(text="w5", fixed_expert="nobody"))
    with pytest.raises(InvalidRequest, match="the prompt has no tokens"):
        await scores(stack, ScorePromptRequest())
    admission = stack.router.keeper.admission
    with admission.reserve(10):
        most, admission.max_running = admission.max_running, 1
        try:
            with pytest.raises(OutOfRoom):
                await scores(stack, ScorePromptRequest(text="w5"))
        finally:
            admission.max_running = most


async def test_an_expert_that_comes_back_is_waited_for_and_the_scores_are_the_same(stack: Stack) -> None:
    request = ScorePromptRequest(token_ids={"ids": [2 + 11 * n % 57 for n in range(70)]}, exact=True)
    whole = await scores(stack, request)
    assert {token.expert for token in whole[1:]} == set(stack.family.experts)
    await stack.stop_expert("math")
    scoring = asyncio.create_task(scores(stack, request))
    try:
        await asyncio.sleep(0.2)
        assert not scoring.done()
    finally:
        await stack.start_expert("math")
    assert await scoring == whole


@pytest.mark.parametrize("chunk_tokens", [7, 256])
async def test_many_ways_at_once_judge_as_each_of_them_alone(stack: Stack, chunk_tokens: int) -> None:
    prompt = PROMPT * 6
    slots = [each.slot for each in (await stack.client.info()).slots]
    options = [{"combine": rule} for rule in ("sum", "gated_sum", "mixture", "select", "route", "router")]
    options += [{"combine": rule, "expert": slot} for slot in slots for rule in ("route", "sum", "mixture")]
    request = score_request(prompt, {"combine": "select", "num_candidates": 1}, 0, options)
    router = stack.router
    async with SessionCloser(router.served, router.directory).running() as closer:
        scorer = PromptScorer(router.served, router.keeper.admission, closer, lambda: False, chunk_tokens)
        tokens = [token async for response in scorer.score(request) for token in response.tokens]
    assert len(tokens) == len(prompt) and not tokens[0].judgements
    own = await stack.client.score(prompt, combine="select", num_candidates=1)
    for token, single in zip(tokens[1:], own[1:], strict=True):
        assert token.logprob == pytest.approx(single.logprob, abs=1e-4)
        assert (token.expert or None) == single.expert
        assert token.top.fused[0].id == single.top.fused[0].id
    for number, way in enumerate(options):
        alone = await stack.client.score(prompt, num_candidates=1, **way)
        for token, single in zip(tokens[1:], alone[1:], strict=True):
            judged = token.judgements[number]
            assert judged.logprob == pytest.approx(single.logprob, abs=1e-4)
            assert (judged.best_id, judged.expert or None) == (single.top.fused[0].id, single.expert)


async def test_many_ways_cost_the_forwards_of_one(stack: Stack) -> None:
    before = stack.router.engine.load().num_forwards
    calls = {name: engine.load().num_forwards for name, engine in stack.engines.items()}
    ways = [{"combine": "route", "expert": slot} for slot in stack.engines] + [{"combine": "mixture"}] * 20
    await stack.client.score(PROMPT * 6, combine="sum", ways=ways)
    assert stack.router.engine.load().num_forwards - before <= 2
    assert all(engine.load().num_forwards - calls[name] <= 2 for name, engine in stack.engines.items())


async def test_a_way_that_cannot_be_served_is_refused_by_name(stack: Stack) -> None:
    with pytest.raises(InvalidRequest, match="fixed_expert = 'nobody'"):
        await stack.client.score(PROMPT, ways=[{"combine": "sum", "expert": "nobody"}])
    with pytest.raises(InvalidRequest, match="at most 32"):
        await stack.client.score(PROMPT, ways=[{"combine": "sum"}] * 33)
