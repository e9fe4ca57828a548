"""Whoever drafts, and whoever is asked early: the text is what the plain loop writes."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from fusionroute.v1 import router_pb2
from fusionroute.v1.router_pb2 import Drafting, GenerateRequest
from router_service import metrics
from tests.equivalence import Case, assert_all_equal, compare, make_cases
from tests.served_stack import Answer, Family, Stack, make_family, served

NUM_CASES = 36


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Family:
    folder: Path = tmp_path_factory.mktemp("family")
    return make_family(folder)


@pytest.fixture(scope="module")
def cases(family: Family) -> list[Case]:
    return make_cases(family.reference(), NUM_CASES)


class Asked:
    """Asks with a drafter of choice and counts what became of the drafts."""

    def __init__(self, stack: Stack, drafting: Drafting.ValueType) -> None:
        self.stack, self.drafting = stack, drafting
        self.counts: Counter[str] = Counter()

    async def __call__(self, request: GenerateRequest) -> Answer:
        request.drafting = self.drafting
        answer = await self.stack.answer(request)
        assert answer.finished is not None
        statistics = answer.finished.statistics
        for each in statistics.drafting:
            self.counts["rounds"] += each.num_rounds
            self.counts["drafted"] += each.num_drafted_tokens
            self.counts["accepted"] += each.num_accepted_tokens
            self.counts[f"drafter {each.drafter}"] += 1
        self.counts["early"] += statistics.num_early_asks
        self.counts["hits"] += statistics.num_early_hits
        self.counts["router forwards"] += statistics.num_router_forwards
        self.counts["tokens"] += len(answer.ids)
        return answer


@pytest.mark.parametrize("num_concurrent", [1, 16])
@pytest.mark.parametrize(
    "drafting", [router_pb2.DRAFTING_ROUTER, router_pb2.DRAFTING_EXPERT, router_pb2.DRAFTING_LOOKUP]
)
async def test_drafts_are_checked_and_change_nothing(
    family: Family, cases: list[Case], drafting: Drafting.ValueType, num_concurrent: int
) -> None:
    async with served(family) as stack:
        asked = Asked(stack, drafting)
        assert_all_equal(await compare(cases, asked, num_concurrent), len(cases))
        counts = asked.counts
        assert counts[f"drafter {drafting}"] > 5, counts
        assert 0 < counts["accepted"] < counts["drafted"]
        if drafting == router_pb2.DRAFTING_LOOKUP:
            assert counts["router forwards"] < counts["tokens"]


@pytest.mark.parametrize("num_concurrent", [1, 16])
async def test_asking_early_changes_nothing(family: Family, cases: list[Case], num_concurrent: int) -> None:
    async with served(family, early_asks="on") as stack:
        asked = Asked(stack, router_pb2.DRAFTING_OFF)
        assert_all_equal(await compare(cases, asked, num_concurrent), len(cases))
        assert 0 < asked.counts["hits"] < asked.counts["early"]
        assert asked.counts["drafted"] == 0


async def test_drafts_survive_evictions_and_restarts(family: Family, cases: list[Case]) -> None:
    modes = (router_pb2.DRAFTING_ROUTER, router_pb2.DRAFTING_EXPERT, router_pb2.DRAFTING_LOOKUP)
    async with served(family, kv_tokens=256, kv_overcommit=100.0, experts={"kv_tokens": 192}) as stack:
        asked = [Asked(stack, mode) for mode in modes]
        turn = 0

        async def answer(request: GenerateRequest) -> Answer:
            nonlocal turn
            turn += 1
            return await asked[turn % len(asked)](request)

        async def restart(done: int) -> None:
            if done == NUM_CASES // 2:
                await stack.stop_expert("math")
                await stack.start_expert("math", kv_tokens=192)

        assert_all_equal(await compare(cases, answer, 8, restart), len(cases))
        assert stack.router.engine.load().num_evictions > 10
        assert all(each.counts["drafted"] for each in asked)


async def test_whatever_is_chosen_in_a_crowd_changes_nothing(family: Family, cases: list[Case]) -> None:
    async with served(family) as stack:
        asked = Asked(stack, router_pb2.DRAFTING_AUTO)
        assert_all_equal(await compare(cases, asked, 16), len(cases))
        assert asked.counts["drafted"] + asked.counts["early"] > 0


async def test_off_drafts_nothing_and_auto_is_the_default(family: Family, cases: list[Case]) -> None:
    async with served(family, early_asks="off") as stack:
        asked = Asked(stack, router_pb2.DRAFTING_OFF)
        await compare(cases[:4], asked, 1)
        assert asked.counts["rounds"] == asked.counts["early"] == 0
        assert stack.router.served.current.offer.default_drafting.value == "auto"


@pytest.mark.parametrize("drafting", [router_pb2.DRAFTING_OFF, router_pb2.DRAFTING_LOOKUP])
async def test_highest_logits_first_change_nothing(
    family: Family, cases: list[Case], drafting: Drafting.ValueType
) -> None:
    """Their tokens are told without log-probability, all others with it."""
    async with served(family, top_logits=12, shared_memory_bytes=0) as stack:
        asked, unknown, told = Asked(stack, drafting), 0, 0

        async def answer(request: GenerateRequest) -> Answer:
            nonlocal unknown, told
            got = await asked(request)
            wanted = {tuple(case.prompt): case for case in cases}[tuple(request.token_ids.ids)].wanted
            for token, reference in zip(got.tokens, wanted, strict=False):
                if token.HasField("logprob"):
                    told += 1
                else:
                    unknown += 1
                    token.logprob = reference.logprob
            return got

        before = {outcome: short_replies(outcome) for outcome in ("certain", "whole_row")}
        assert_all_equal(await compare(cases, answer, 8), len(cases))
        assert unknown == short_replies("certain") - before["certain"] > 20
        assert short_replies("whole_row") - before["whole_row"] > 5
        assert told > 20


def short_replies(outcome: str) -> float:
    return metrics.SHORT_REPLIES.labels(outcome)._value.get()
