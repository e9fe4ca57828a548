"""Baselines that are served as request options: a drawn expert, the mean of all experts, proxy-tuning.

What the services stream is what the plain loop writes, one session or several, with caches that are lost all the time.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from transformers import AutoModelForCausalLM

from fusionroute import private_redis
from fusionroute.errors import FusionRouteError, ModelRejected, Reason
from fusionroute.fusion import CombineRule, drawn_expert
from fusionroute.v1 import router_pb2
from fusionroute.v1.router_pb2 import (
    Drafting,
    GenerateRequest,
    SamplingParameters,
    ScorePromptRequest,
    ScoringWay,
)
from router_service.turn_request import RULE_MESSAGES
from tests.equivalence import Case, assert_all_equal, compare, make_cases
from tests.reference import Reference
from tests.served_stack import SLOTS, Answer, Family, Stack, make_family, served
from tests.tiny_models import save_tiny_model

pytestmark = pytest.mark.asyncio(loop_scope="module")
BASE = "base"
PROMPT = [5, 9, 20, 33, 41, 7]
LENGTH = 16
SEED = 11


@dataclass(frozen=True)
class Way:
    """A baseline, and what each token of it costs."""

    rule: str
    draws: bool = False
    expert_calls: int = 1
    router_forwards: int = 1

    @property
    def options(self) -> dict[str, Any]:
        """Of any request."""
        choice = router_pb2.EXPERT_CHOICE_RANDOM if self.draws else router_pb2.EXPERT_CHOICE_UNSPECIFIED
        return {"combine": RULE_MESSAGES[CombineRule(self.rule)], "expert_choice": choice}

    def request(self, **fields: Any) -> GenerateRequest:
        """A long greedy answer to the same prompt."""
        sampling = SamplingParameters(max_tokens=LENGTH, ignore_eos=True, seed=SEED)
        return GenerateRequest(token_ids={"ids": PROMPT}, sampling=sampling, **self.options, **fields)

    def __str__(self) -> str:
        return f"random {self.rule}" if self.draws else self.rule


ENSEMBLE = Way("ensemble", expert_calls=len(SLOTS), router_forwards=0)
PROXY = Way("proxy", expert_calls=2)
DRAWN = Way("sum", draws=True)
WAYS = (
    ENSEMBLE,
    PROXY,
    DRAWN,
    Way("route", draws=True, router_forwards=0),
    Way("proxy", draws=True, expert_calls=2),
)


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Family:
    folder: Path = tmp_path_factory.mktemp("family")
    made = make_family(folder)
    return replace(made, experts=made.experts | {BASE: save_tiny_model(folder / BASE, "qwen3", seed=30)})


@pytest.fixture(scope="module")
def reference(family: Family) -> Reference:
    own = {slot: path for slot, path in family.experts.items() if slot != BASE}
    base = AutoModelForCausalLM.from_pretrained(family.experts[BASE])
    return replace(replace(family, experts=own).reference(), base=base.eval())


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def stack(family: Family) -> AsyncIterator[Stack]:
    """With so little memory for keys and values that sessions side by side evict each other."""
    scarce = {"kv_tokens": 96, "kv_overcommit": 100.0, "experts": {"kv_tokens": 96}}
    async with served(family, base_slot=BASE, degrade_after_seconds=0.2, **scarce) as stack:
        yield stack


@pytest.fixture(scope="module")
def cases(reference: Reference) -> list[Case]:
    drawn = ("sum", "gated_sum", "mixture", "select", "route", "proxy")
    return [
        *make_cases(reference, 12, max_tokens=8, rules=("ensemble", "proxy")),
        *make_cases(reference, 12, max_tokens=8, rules=drawn, draws_experts=True),
    ]


@pytest.mark.parametrize("num_concurrent", [1, 8])
async def test_baselines_are_those_of_the_plain_loop_whatever_is_evicted(
    stack: Stack, cases: list[Case], num_concurrent: int
) -> None:
    answers: dict[tuple[int, ...], Answer] = {}

    async def answer(request: GenerateRequest) -> Answer:
        given = await stack.answer(request)
        answers[(*request.token_ids.ids, request.combine, request.expert_choice)] = given
        return given

    assert_all_equal(await compare(cases, answer, num_concurrent), len(cases))
    for case in cases:
        request = case.request()
        tokens = answers[(*case.prompt, request.combine, request.expert_choice)].tokens
        wanted = ["" if each.expert is None else SLOTS[each.expert] for each in case.wanted]
        assert [token.expert for token in tokens] == wanted
    if num_concurrent > 1:
        engines = [stack.router.engine, *stack.engines.values()]
        assert len(engines) == 5
        assert all(engine.load().num_evictions > 3 for engine in engines)


@pytest.mark.parametrize("way", WAYS, ids=str)
async def test_a_token_costs_what_is_promised_and_nobody_drafts_unasked(stack: Stack, way: Way) -> None:
    answer = await stack.answer(way.request(num_top_candidates=2, return_routing_weights=True))
    assert answer.finished is not None
    spent = answer.finished.statistics
    assert spent.num_expert_calls == LENGTH * way.expert_calls
    assert spent.num_router_forwards == LENGTH * way.router_forwards
    assert not spent.drafting and not spent.num_early_asks
    for index, token in enumerate(answer.tokens):
        expected = SLOTS[drawn_expert(SEED, len(PROMPT) + index, len(SLOTS))] if way.draws else token.expert
        assert token.expert == ("" if way is ENSEMBLE else expected)
        assert len(token.top.fused) == 2
        assert len(token.top.router) == 2 * way.router_forwards
        assert len(token.routing_weights) == len(SLOTS) * way.router_forwards
        assert len(token.top.expert) == (0 if way is ENSEMBLE else 2)


@pytest.mark.parametrize(
    "drafting", [router_pb2.DRAFTING_ROUTER, router_pb2.DRAFTING_EXPERT, router_pb2.DRAFTING_LOOKUP]
)
@pytest.mark.parametrize("way", WAYS, ids=str)
async def test_drafts_that_are_asked_for_change_nothing(
    stack: Stack, way: Way, drafting: Drafting.ValueType
) -> None:
    plain = await stack.answer(way.request(exact=True))
    drafted = await stack.answer(way.request(exact=True, drafting=drafting))
    assert [(each.id, each.logprob, each.expert) for each in drafted.tokens] == [
        (each.id, each.logprob, each.expert) for each in plain.tokens
    ]
    assert drafted.finished is not None
    drafters = {each.drafter for each in drafted.finished.statistics.drafting}
    is_possible = drafting == router_pb2.DRAFTING_LOOKUP or (
        way is not ENSEMBLE and not (way.rule == "route" and drafting == router_pb2.DRAFTING_ROUTER)
    )
    assert drafters <= ({drafting} if is_possible else set())
    if (
        is_possible and drafting != router_pb2.DRAFTING_LOOKUP
    ):  # which has nothing to propose where nothing recurs
        assert drafters == {drafting}


@pytest.mark.parametrize("way", WAYS, ids=str)
async def test_an_answer_scores_what_it_was_told_to_be_worth_alone_and_among_other_ways(
    stack: Stack, way: Way
) -> None:
    answer = await stack.answer(way.request(exact=True))
    told = [(each.id, each.logprob, each.expert) for each in answer.tokens]
    ids = [*PROMPT, *answer.ids]
    request = ScorePromptRequest(
        token_ids={"ids": ids}, exact=True, seed=SEED, from_position=len(PROMPT), **way.options
    )
    scored = [token async for token in stack.client.score_prompt(request)]
    assert [(each.id, each.logprob, each.expert) for each in scored] == told
    request.ways.extend(ScoringWay(**each.options) for each in WAYS)
    place = WAYS.index(way)
    judged = [token async for token in stack.client.score_prompt(request)]
    assert [(each.id, each.logprob, each.expert) for each in judged] == told
    mine = [each.judgements[place] for each in judged]
    assert [(each.best_id, each.logprob, each.expert) for each in mine] == told


@pytest.mark.parametrize(
    ("way", "slot"), [(ENSEMBLE, "strings"), (PROXY, BASE), (PROXY, "math"), (DRAWN, "strings")], ids=str
)
async def test_a_turn_that_fails_for_want_of_a_model_goes_on_as_it_would_have(
    stack: Stack, way: Way, slot: str
) -> None:
    undisturbed = await stack.answer(way.request(exact=True))
    await stack.stop_expert(slot)
    await stack.start_expert(slot, kv_tokens=96, linked=True)
    session_id = f"broken-{way.rule}-{slot}"
    request = way.request(
        exact=True, session_id=session_id, on_expert_unavailable=router_pb2.ON_EXPERT_UNAVAILABLE_FAIL
    )
    written: list[int] = []
    with pytest.raises(FusionRouteError) as caught:
        async for event in stack.client.generate(request, 60):
            if event.WhichOneof("event") == "token":
                written.append(event.token.id)
                if len(written) == 3:
                    stack.links[slot].base_delay_seconds = 1.0  # the turn must not end meanwhile
                    await stack.stop_expert(slot)
    await stack.start_expert(slot, kv_tokens=96)
    assert caught.value.reason is Reason.EXPERT_UNAVAILABLE
    assert 3 <= len(written) < LENGTH
    resumed = await stack.resume(session_id)
    assert resumed.ids[: len(written)] == written
    assert [(each.id, each.expert) for each in resumed.tokens] == [
        (each.id, each.expert) for each in undisturbed.tokens
    ]


async def test_a_model_that_comes_back_is_waited_for(stack: Stack) -> None:
    wanted = await stack.answer(PROXY.request(exact=True))
    await stack.stop_expert(BASE)
    waiting = asyncio.create_task(stack.answer(PROXY.request(exact=True)))
    try:
        await asyncio.sleep(0.1)
        assert not waiting.done()
    finally:
        await stack.start_expert(BASE, kv_tokens=96)
    assert (await waiting).ids == wanted.ids


async def test_a_drawn_expert_depends_on_the_seed_alone_and_sampling_is_as_ever(stack: Stack) -> None:
    request = DRAWN.request()
    request.sampling.temperature = 0.9
    answers = [await stack.answer(request) for _ in range(2)]
    assert answers[0].tokens == answers[1].tokens
    drawn = [SLOTS[drawn_expert(SEED, len(PROMPT) + index, len(SLOTS))] for index in range(LENGTH)]
    assert [token.expert for token in answers[0].tokens] == drawn
    request.sampling.seed = SEED + 1
    assert [token.expert for token in (await stack.answer(request)).tokens] != drawn


async def test_baselines_are_options_of_the_python_client(stack: Stack) -> None:
    for options in ({"expert_choice": "random"}, {"combine": "ensemble"}, {"combine": "proxy"}):
        answer = await stack.client.complete(PROMPT, max_tokens=LENGTH, ignore_eos=True, seed=SEED, **options)
        assert answer.combine == options.get("combine", "sum")
        scored = await stack.client.score(
            [*PROMPT, *(token.id for token in answer.tokens)], seed=SEED, **options
        )
        of_answer = scored[len(PROMPT) :]
        assert [token.expert for token in of_answer] == [token.expert for token in answer.tokens]
        told = [token.logprob for token in answer.tokens]
        assert [token.logprob for token in of_answer] == pytest.approx(told, abs=1e-4)


async def test_a_router_tells_of_its_base_model(stack: Stack) -> None:
    info = await stack.client.info()
    assert info.base.slot == BASE and info.base.ready
    assert [slot.slot for slot in info.slots] == list(SLOTS)
    assert router_pb2.COMBINE_RULE_PROXY in info.available_combine


async def test_a_base_model_has_no_slot_of_the_checkpoint(family: Family) -> None:
    with pytest.raises(ModelRejected, match="routes to slot 'math'"):
        async with served(family, base_slot="math", start=False):
            pass


async def test_a_turn_whose_base_model_is_no_longer_served_here_says_so(family: Family) -> None:
    with private_redis.PrivateRedis(None) as redis:
        async with served(family, base_slot=BASE, start=False, redis_url=redis.url) as before:
            request = PROXY.request(
                session_id="left", on_expert_unavailable=router_pb2.ON_EXPERT_UNAVAILABLE_FAIL
            )
            with pytest.raises(FusionRouteError):
                await before.answer(request)
        async with served(family, start=False, redis_url=redis.url) as after:
            assert router_pb2.COMBINE_RULE_PROXY not in (await after.client.info()).available_combine
            with pytest.raises(FusionRouteError, match="the rule 'proxy'") as caught:
                await after.resume("left")
            assert caught.value.reason is Reason.RULE_NOT_AVAILABLE
