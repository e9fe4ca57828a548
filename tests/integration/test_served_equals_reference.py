"""What the services stream is what the plain loop writes: alone, in company, evicted, with experts restarted."""

from __future__ import annotations

from pathlib import Path

import pytest

from fusionroute.v1.router_pb2 import GenerateRequest
from tests.equivalence import Case, assert_all_equal, assert_written_across_restarts, compare, make_cases
from tests.served_stack import Answer, Family, Stack, make_family, served

NUM_DISTURBED = 100
"""Of the cases, where each is disturbed many times on its way."""


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Family:
    folder: Path = tmp_path_factory.mktemp("family")
    return make_family(folder)


@pytest.fixture(scope="module")
def cases(family: Family) -> list[Case]:
    return make_cases(family.reference())


def test_the_reference_cases_use_every_expert_and_the_router_alone(cases: list[Case]) -> None:
    experts = [token.expert for case in cases for token in case.wanted]
    assert {0, 1, 2, None} <= set(experts)
    switches = sum(
        a.expert != b.expert for case in cases for a, b in zip(case.wanted, case.wanted[1:], strict=False)
    )
    assert switches > len(cases)


@pytest.mark.parametrize("num_concurrent", [1, 16])
async def test_two_hundred_prompts_equal_the_plain_loop(
    family: Family, cases: list[Case], num_concurrent: int
) -> None:
    async with served(family) as stack:
        verdict = await compare(cases, stack.answer, num_concurrent)
        assert_all_equal(verdict, len(cases))
        if num_concurrent > 1:
            assert stack.router.engine.load().num_forwards < _router_rows(cases)


async def test_forced_evictions_change_nothing(family: Family, cases: list[Case]) -> None:
    async with served(family, kv_tokens=256, kv_overcommit=100.0, experts={"kv_tokens": 192}) as stack:
        verdict = await compare(cases[:NUM_DISTURBED], stack.answer, 16)
        assert_all_equal(verdict, NUM_DISTURBED)
        assert stack.router.engine.load().num_evictions > 50
        assert all(engine.load().num_evictions > 50 for engine in stack.engines.values())


async def test_experts_restarted_in_mid_generation_change_nothing(family: Family, cases: list[Case]) -> None:
    async with served(family) as stack:
        answers: list[Answer] = []

        async def answer(request: GenerateRequest) -> Answer:
            got = await stack.answer(request)
            answers.append(got)
            return got

        async def restart(done: int) -> None:
            slot = {20: "math", 40: "strings", 60: "format"}.get(done)
            if slot is not None:
                await stack.stop_expert(slot)
                await stack.start_expert(slot)

        verdict = await compare(cases[:NUM_DISTURBED], answer, 16, restart)
        assert_all_equal(verdict, NUM_DISTURBED)
        assert_written_across_restarts(answers, family.experts)
        assert all(engine.load().num_forwards > 0 for engine in stack.engines.values())


async def test_one_more_expert_costs_no_more_forwards(tmp_path: Path) -> None:
    """Forwards per token are one of the router and one of the chosen expert, however many experts there are."""
    per_token = {}
    for num_experts in (1, 2, 4, 8):
        slots = tuple(f"slot{index}" for index in range(num_experts))
        family = make_family(tmp_path / str(num_experts), slots)
        async with served(family, early_asks="off", drafting="off") as stack:
            per_token[num_experts] = await _forwards_per_token(stack)
    assert per_token == dict.fromkeys((1, 2, 4, 8), (1.0, 1.0))


async def _forwards_per_token(stack: Stack) -> tuple[float, float]:
    num_tokens = 0
    router_before = stack.router.engine.load().num_forwards
    experts_before = sum(engine.load().num_forwards for engine in stack.engines.values())
    for start in range(3):
        prompt = [2 + start, 5, 9, 11]
        answer = await stack.answer(
            GenerateRequest(token_ids={"ids": prompt}, sampling={"max_tokens": 20, "ignore_eos": True})
        )
        num_tokens += len(answer.tokens)
    router = stack.router.engine.load().num_forwards - router_before
    experts = sum(engine.load().num_forwards for engine in stack.engines.values()) - experts_before
    return router / num_tokens, experts / num_tokens


def _router_rows(cases: list[Case]) -> int:
    return sum(len(case.wanted) for case in cases)
