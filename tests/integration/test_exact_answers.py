"""Exact answers are the same to the last bit, in a 16-bit format, however they are computed."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from fusionroute.v1 import router_pb2
from fusionroute.v1.router_pb2 import Drafting, GenerateRequest
from tests.equivalence import make_cases
from tests.served_stack import Family, Stack, make_family, served

NUM_PROMPTS = 16

Told = list[list[tuple[int, float, str]]]


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Family:
    folder: Path = tmp_path_factory.mktemp("family")
    return make_family(folder)


@pytest.fixture(scope="module")
def requests(family: Family) -> list[GenerateRequest]:
    return [case.request() for case in make_cases(family.reference(), NUM_PROMPTS)]


async def told(
    stack: Stack, requests: list[GenerateRequest], drafting: Drafting.ValueType, num_concurrent: int, *, exact: bool
) -> Told:
    """Ids, log-probabilities and experts of all answers."""
    gate = asyncio.Semaphore(num_concurrent)

    async def one(asked: GenerateRequest) -> list[tuple[int, float, str]]:
        request = GenerateRequest()
        request.CopyFrom(asked)
        request.exact, request.drafting = exact, drafting
        async with gate:
            answer = await stack.answer(request)
        return [(token.id, token.logprob, token.expert) for token in answer.tokens]

    return await asyncio.gather(*(one(request) for request in requests))


async def test_exact_answers_keep_every_bit_in_company_with_drafts_and_after_evictions(
    family: Family, requests: list[GenerateRequest]
) -> None:
    sixteen_bit = {"dtype": "bfloat16"}
    async with served(family, **sixteen_bit, experts=sixteen_bit) as stack:
        alone = await told(stack, requests, router_pb2.DRAFTING_OFF, 1, exact=True)
        for drafting in (
            router_pb2.DRAFTING_OFF,
            router_pb2.DRAFTING_ROUTER,
            router_pb2.DRAFTING_EXPERT,
            router_pb2.DRAFTING_LOOKUP,
        ):
            assert await told(stack, requests, drafting, NUM_PROMPTS, exact=True) == alone
        others = await told(stack, requests, router_pb2.DRAFTING_ROUTER, NUM_PROMPTS, exact=False)
        assert others != alone, "rounding shows nowhere: this test could not fail"
    small = {"kv_tokens": 192} | sixteen_bit
    async with served(family, kv_tokens=256, kv_overcommit=100.0, dtype="bfloat16", experts=small) as stack:
        assert await told(stack, requests, router_pb2.DRAFTING_LOOKUP, NUM_PROMPTS, exact=True) == alone
        assert stack.router.engine.load().num_evictions > 5
