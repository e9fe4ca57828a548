"""A router takes up a promoted checkpoint while it serves: nothing is lost, nothing mixed, nothing broken taken."""

from __future__ import annotations

import asyncio
import gc
import shutil
import weakref
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fusionroute.errors import FusionRouteError, Reason
from fusionroute.manifest import COMPLETE_FILE, written_fingerprint
from fusionroute.private_redis import PrivateRedis, connect
from fusionroute.promotions import Promotion, PromotionStore
from fusionroute.router_model import load_checkpoint
from fusionroute.v1.router_pb2 import GenerateRequest, GetRouterInfoResponse, SamplingParameters
from router_service.bootstrap import load_first
from router_service.settings import RouterSettings
from tests.equivalence import Case, Verdict, make_cases
from tests.served_stack import Answer, Family, Stack, make_family, record_of, save_router, served
from tests.tiny_models import save_tiny_model

pytestmark = pytest.mark.timeout(240)

A, B = "run-sft-a", "run-cdpo-b"
WAIT_SECONDS = 30
NUM_CASES = 48


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Family:
    return make_family(tmp_path_factory.mktemp("family"))


@pytest.fixture(scope="module")
def published(family: Family, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two more routers for the same experts."""
    folder = tmp_path_factory.mktemp("published")
    records = load_checkpoint(family.router).manifest.experts
    for seed, name in ((22, A), (31, B)):
        save_router(folder / name, records, seed=seed)
    return folder


@pytest.fixture
def redis() -> Iterator[str]:
    """One for each test: what is promoted stays so."""
    with PrivateRedis() as server:
        yield server.url


class Promoting:
    """A stack that follows promotions, and whoever promotes."""

    def __init__(self, stack: Stack, promotions: PromotionStore, published: Path) -> None:
        self.stack, self.promotions, self.published = stack, promotions, published

    async def promote(self, name: str) -> Promotion:
        seen = await self.promotions.read()
        return await self.promotions.promote(name, written_fingerprint(self.published / name), seen.revision)

    async def acted_upon(self, promotion: Promotion) -> GetRouterInfoResponse:
        """What the router says once it has acted upon a promotion."""
        async with asyncio.timeout(WAIT_SECONDS):
            while (info := await self.stack.client.info()).promotion_revision != promotion.revision:
                await asyncio.sleep(0.02)
        return info

    async def retired(self) -> None:
        async with asyncio.timeout(WAIT_SECONDS):
            while (await self.stack.client.info()).num_retiring_checkpoints:
                await asyncio.sleep(0.02)


@asynccontextmanager
async def promoting(family: Family, published: Path, redis: str, **settings: Any) -> AsyncIterator[Promoting]:
    follow = {"checkpoints_dir": published, "promotion_poll_seconds": 0.05, "redis_url": redis}
    client = connect(redis)
    try:
        async with served(family, **(follow | settings)) as stack:
            yield Promoting(stack, PromotionStore(client), published)
    finally:
        await client.aclose()


def ask(prompt: list[int], max_tokens: int = 12, **changes: Any) -> GenerateRequest:
    sampling = SamplingParameters(max_tokens=max_tokens, ignore_eos=True)
    return GenerateRequest(token_ids={"ids": prompt}, sampling=sampling, **changes)


def held_up(session_id: str) -> GenerateRequest:
    """A turn that waits for the expert of `math`, which the test does not start yet."""
    return ask([5, 9, 11, 3], session_id=session_id, fixed_expert="math")


async def alone(family: Family, request: GenerateRequest) -> Answer:
    """The answer of a router that hears of no promotion."""
    async with served(family) as stack:
        return await stack.answer(request)


async def test_under_load_every_answer_is_wholly_of_the_checkpoint_it_was_begun_under(
    family: Family, published: Path, redis: str
) -> None:
    routers = [family.router, published / A, published / B]
    cases: dict[str, list[Case]] = {}
    for router in routers:
        cases[written_fingerprint(router)] = make_cases(replace(family, router=router).reference(), NUM_CASES)
    verdict, begun_under = Verdict(), set()
    async with promoting(family, published, redis) as promoted:
        gate, num_done = asyncio.Semaphore(8), 0

        async def one(number: int) -> None:
            nonlocal num_done
            async with gate:
                request = cases[written_fingerprint(family.router)][number].request()
                answer = await promoted.stack.answer(request)
            begun_under.add(answer.started.checkpoint)
            verdict.count(cases[answer.started.checkpoint][number], answer)
            num_done += 1

        async def operate() -> None:
            for name, after in ((A, 10), (B, 20)):
                while num_done < after:
                    await asyncio.sleep(0.005)
                await promoted.promote(name)
            while num_done < 32:
                await asyncio.sleep(0.005)
            await promoted.promotions.rollback((await promoted.promotions.read()).revision)

        async with asyncio.timeout(100), asyncio.TaskGroup() as group:
            group.create_task(operate())
            for number in range(NUM_CASES):
                group.create_task(one(number))
        await promoted.acted_upon(await promoted.promotions.read())
        await promoted.retired()
        last = await promoted.stack.answer(cases[written_fingerprint(family.router)][0].request())
        assert last.started.checkpoint == written_fingerprint(published / A)
    assert not verdict.different, verdict.different[:3]
    assert verdict.num_equal + verdict.num_ties == NUM_CASES and verdict.num_ties <= 2
    assert begun_under == set(cases)


async def test_a_turn_that_runs_ends_on_its_checkpoint_which_is_then_closed_and_freed(
    family: Family, published: Path, redis: str
) -> None:
    wanted = (await alone(family, held_up("x"))).ids
    async with promoting(family, published, redis, start=False) as promoted:
        stack = promoted.stack
        for slot in ("strings", "format"):
            await stack.start_expert(slot)
        model = weakref.ref(stack.router.engine.model.model)
        running = asyncio.create_task(stack.answer(held_up("talk")))
        async with asyncio.timeout(WAIT_SECONDS):
            while not stack.router.keeper.num_running:
                await asyncio.sleep(0.01)
        info = await promoted.acted_upon(await promoted.promote(A))
        assert (info.checkpoint_id, info.promotion_error, info.num_retiring_checkpoints) == (A, "", 1)
        assert info.checkpoint == written_fingerprint(published / A)
        following = asyncio.create_task(stack.resume("talk"))
        new = await stack.answer(ask([7, 8], fixed_expert="strings"))
        assert new.started.checkpoint == info.checkpoint
        assert model() is not None
        await stack.start_expert("math")
        answers = await asyncio.gather(running, following)
        assert [answer.ids for answer in answers] == [wanted, wanted]
        assert {answer.started.checkpoint for answer in answers} == {written_fingerprint(family.router)}
        await promoted.retired()
        later = await stack.answer(ask([7, 8], session_id="talk"))
        assert later.started.checkpoint == info.checkpoint
    fresh = replace(family, router=published / A)
    assert later.ids == (await alone(fresh, ask([5, 9, 11, 3, *wanted, 7, 8]))).ids
    assert model() is None, gc.get_referrers(model())


async def test_two_quick_promotions_leave_three_checkpoints_each_with_its_turns(
    family: Family, published: Path, redis: str
) -> None:
    routers = [family.router, published / A, published / B]
    wanted = [(await alone(replace(family, router=router), held_up("x"))).ids for router in routers]
    async with promoting(family, published, redis, start=False) as promoted:
        turns = []
        for number, name in enumerate(["", A, B]):
            if name:
                await promoted.acted_upon(await promoted.promote(name))
            turns.append(asyncio.create_task(promoted.stack.answer(held_up(f"s{number}"))))
            async with asyncio.timeout(WAIT_SECONDS):
                while promoted.stack.router.keeper.num_running <= number:
                    await asyncio.sleep(0.01)
        assert (await promoted.stack.client.info()).num_retiring_checkpoints == 2
        back = await promoted.promotions.rollback((await promoted.promotions.read()).revision)
        await asyncio.sleep(0.3)
        info = await promoted.stack.client.info()
        assert info.promotion_revision != back.revision, "a fourth checkpoint must wait for room"
        for slot in family.experts:
            await promoted.stack.start_expert(slot)
        assert [answer.ids for answer in await asyncio.gather(*turns)] == wanted
        assert (await promoted.acted_upon(back)).checkpoint_id == A


async def test_rolling_the_first_promotion_back_leads_to_the_checkpoint_of_the_settings(
    family: Family, published: Path, redis: str
) -> None:
    async with promoting(family, published, redis, start=False) as promoted:
        first = await promoted.promote(A)
        assert (await promoted.acted_upon(first)).checkpoint_id == A
        info = await promoted.acted_upon(await promoted.promotions.rollback(first.revision))
        assert (info.checkpoint_id, info.checkpoint) == ("", written_fingerprint(family.router))


async def test_a_checkpoint_that_cannot_be_served_changes_nothing_but_the_report(
    family: Family, published: Path, redis: str, tmp_path: Path
) -> None:
    folder = tmp_path / "published"
    shutil.copytree(published, folder)
    records = load_checkpoint(family.router).manifest.experts
    (folder / A / COMPLETE_FILE).unlink()
    save_router(folder / "vocabulary", records, tokenizer_fingerprint="another")
    save_router(folder / "slots", (*records, replace(records[0], slot="code")))
    shutil.copytree(folder / B, folder / "changed")
    shutil.copy(folder / "slots" / "model.safetensors", folder / "changed" / "model.safetensors")
    async with promoting(family, folder, redis) as promoted:
        before = await promoted.stack.client.info()
        for name, named in (
            (A, COMPLETE_FILE),
            ("nowhere", "does not exist"),
            ("vocabulary", "another"),
            ("slots", "'code'"),
            ("changed", "fingerprint"),
        ):
            info = await promoted.acted_upon(await promoted.promote(name))
            assert named in info.promotion_error and name in info.promotion_error
            assert (info.checkpoint, info.checkpoint_id) == (before.checkpoint, "")
            assert len((await promoted.stack.answer(ask([5, 9], 3))).ids) == 3
        info = await promoted.acted_upon(await promoted.promote(B))
        assert (info.checkpoint_id, info.promotion_error) == (B, "")


async def test_an_extended_checkpoint_is_taken_up_once_its_new_expert_serves(
    family: Family, published: Path, redis: str, tmp_path: Path
) -> None:
    path = save_tiny_model(tmp_path / "code", "qwen3", seed=30)
    records = load_checkpoint(family.router).manifest.experts
    save_router(tmp_path / "extended", (record_of("code", path), *records), seed=23)
    extended = replace(family, experts={**family.experts, "code": path})
    async with promoting(extended, tmp_path, redis, start=False, spare_slots="code") as promoted:
        for slot in extended.experts:
            await promoted.stack.start_expert(slot)
        before = await promoted.stack.answer(ask([5, 9, 11, 3], session_id="old"))
        info = await promoted.acted_upon(await promoted.promote("extended"))
        assert info.promotion_error == ""
        assert [slot.slot for slot in info.slots] == ["code", *family.experts]
        answer = await promoted.stack.answer(ask([5, 9], 2, fixed_expert="code"))
        assert {token.expert for token in answer.tokens} == {"code"}
        again = await promoted.stack.resume("old")
        assert [token.expert for token in again.tokens] == [token.expert for token in before.tokens]


async def test_a_turn_put_aside_is_not_continued_by_another_checkpoint(
    family: Family, published: Path, redis: str
) -> None:
    async with promoting(family, published, redis, start=False, alone_seconds=0.1) as promoted:
        stack = promoted.stack
        held = asyncio.create_task(stack.answer(held_up("talk")))
        async with asyncio.timeout(WAIT_SECONDS):
            while not stack.router.keeper.num_running:
                await asyncio.sleep(0.01)
        await promoted.acted_upon(await promoted.promote(A))
        held.cancel()
        await asyncio.gather(held, return_exceptions=True)
        await asyncio.sleep(0.2)
        for slot in family.experts:
            await stack.start_expert(slot)
        await promoted.retired()
        with pytest.raises(FusionRouteError) as caught:
            await stack.resume("talk")
        assert caught.value.reason is Reason.CHECKPOINT_CHANGED
        assert written_fingerprint(published / A) in caught.value.message


def test_a_router_begins_with_the_promoted_checkpoint_or_else_with_its_own(
    family: Family, published: Path, redis: str
) -> None:
    options: dict[str, Any] = {"checkpoint": str(family.router), "checkpoints_dir": published}
    settings = RouterSettings(**options)

    async def promoted(name: str) -> Promotion:
        client = connect(redis)
        store = PromotionStore(client)
        promotion = await store.promote(name, "", (await store.read()).revision)
        await client.aclose()
        return promotion

    first = load_first(settings, asyncio.run(promoted(B)))
    assert (first.checkpoint_id, first.report.error) == (B, "")
    assert first.hand_over().fingerprint == written_fingerprint(published / B)
    promotion = asyncio.run(promoted("gone"))
    first = load_first(settings, promotion)
    assert (first.checkpoint_id, first.report.revision) == ("", promotion.revision)
    assert "gone" in first.report.error
    assert first.hand_over().fingerprint == written_fingerprint(family.router)
