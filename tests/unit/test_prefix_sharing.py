"""Sessions that begin alike share what they have in common, and nobody's rows show it."""

from __future__ import annotations

import asyncio
import copy

import pytest
import torch

from fusionroute.engine import Closing, Engine, EngineLimits, StepCall, StepOutcome, prepare_model
from tests.tiny_models import WIDTH, eager_rows, tiny_model, word_tokenizer

FAMILIES = ["llama", "gemma2", "qwen2", "qwen3"]
PROMPT = [2 + (7 * index) % 50 for index in range(40)]


def make_engine(family: str = "llama", *, shortest: int = 8, kv_tokens: int = 1024, **limits: int) -> Engine:
    loaded = prepare_model(copy.deepcopy(MODELS[family]), word_tokenizer(), name=family, epoch=7)
    return Engine(loaded, EngineLimits(kv_tokens=kv_tokens, shortest_shared_tokens=shortest, **limits))


MODELS = {family: tiny_model(family) for family in FAMILIES}


def assert_rows_equal(got: torch.Tensor, family: str, tokens: list[int]) -> None:
    wanted = eager_rows(MODELS[family], tokens)[-len(got) :]
    torch.testing.assert_close(got, wanted, atol=2e-5, rtol=2e-5)


async def begin(engine: Engine, name: str, tokens: list[int], exact: bool = False) -> StepOutcome:
    return await engine.step(StepCall(name, 0, tokens, 1, exact=exact))


async def kv_tokens(engine: Engine) -> int:
    await engine.list_sessions(1)  # the worker has done what it was asked before
    return engine.load().kv_tokens_used


@pytest.mark.parametrize("family", FAMILIES)
async def test_sessions_that_share_a_prompt_go_on_side_by_side_with_the_rows_of_lonely_ones(
    family: str,
) -> None:
    texts = {f"s{number}": [*PROMPT[: 40 - 3 * number], 51 + number, 3] for number in range(4)}
    async with make_engine(family, prefill_chunk_tokens=16) as engine:
        for name, tokens in texts.items():
            outcome = await begin(engine, name, tokens)
            assert_rows_equal(outcome.rows, family, tokens)
            assert outcome.num_computed_tokens == (42 if name == "s0" else 2)
        for turn in range(8):
            fed = {name: [[2 + turn], [5, 6 + turn]][number % 2] for number, name in enumerate(texts)}
            calls = [StepCall(name, len(texts[name]), fed[name], len(fed[name])) for name in texts]
            for name, result in zip(texts, await engine.step_batch(calls), strict=True):
                texts[name] += fed[name]
                assert isinstance(result, StepOutcome)
                assert_rows_equal(result.rows, family, texts[name])


@pytest.mark.parametrize("family", ["llama", "gemma2"])
async def test_parts_upon_parts(family: str) -> None:
    """Each session knows more of the text than the one before, so that each adds a part, as long as it may."""
    texts = [[*PROMPT[: 12 * count], 55, 56] for count in range(1, 4)] + [[*PROMPT, 57], [*PROMPT, 58]]
    async with make_engine(family) as engine:
        for number, tokens in enumerate(reversed(texts)):
            assert_rows_equal((await begin(engine, f"s{number}", tokens)).rows, family, tokens)
        for number, tokens in enumerate(texts):
            outcome = await begin(engine, f"t{number}", tokens)
            assert outcome.num_computed_tokens <= 2
            assert_rows_equal(outcome.rows, family, tokens)
            outcome = await engine.step(StepCall(f"t{number}", len(tokens), [9], 1))
            assert_rows_equal(outcome.rows, family, [*tokens, 9])


async def test_what_is_shared_is_counted_once_and_given_back_with_its_last_user() -> None:
    async with make_engine() as engine:
        await begin(engine, "a", [*PROMPT, 50])
        alone = await kv_tokens(engine)
        await begin(engine, "b", [*PROMPT, 51])
        await begin(engine, "c", [*PROMPT, 52])
        assert await kv_tokens(engine) == alone + 2 * 16
        for name in "abc":
            await engine.close_session(name)
        assert await kv_tokens(engine) == 0


async def test_a_closed_session_is_what_the_next_one_begins_with() -> None:
    async with make_engine() as engine:
        await begin(engine, "a", [*PROMPT, 50, 51, 52])
        await engine.close_session("a")
        views, count = await engine.list_sessions(10)
        assert (views, count) == ([], 0)
        for name in "bcd":
            outcome = await begin(engine, name, [*PROMPT, 53, 54])
            assert outcome.num_computed_tokens == (2 if name == "b" else 1)
            assert_rows_equal(outcome.rows, "llama", [*PROMPT, 53, 54])
            await engine.close_session(name)


async def test_of_a_session_that_was_closed_for_good_nothing_is_left() -> None:
    async with make_engine() as engine:
        await begin(engine, "a", [*PROMPT, 50, 51, 52])
        assert await engine.close_session("a", for_good=True)
        outcome = await begin(engine, "b", [*PROMPT, 53, 54])
        assert outcome.num_computed_tokens == len(PROMPT) + 2


async def test_sessions_that_are_let_go_are_forgotten_unless_somebody_else_goes_on_with_them() -> None:
    async with make_engine() as engine:
        for name in "abc":
            await begin(engine, name, [*PROMPT, 50])
        await engine.step(StepCall("b", 41, [7], 1, fence=9))
        engine.let_go([Closing("a"), Closing("b", 8), Closing("unknown"), Closing("c", for_good=True)])
        views, _ = await engine.list_sessions(10)
        assert [view.session_id for view in views] == ["b"]
        assert (await begin(engine, "d", [*PROMPT, 8])).num_computed_tokens == 1, (
            "what they began with is shared"
        )


@pytest.mark.parametrize("length", [4, 20, 39])
async def test_a_session_that_cuts_back_into_what_it_shares_disturbs_nobody(length: int) -> None:
    async with make_engine("gemma2") as engine:
        for name in "abc":
            await begin(engine, name, [*PROMPT, 50])
        cut = await engine.step(StepCall("b", length, [60, 59], 2))
        assert cut.num_computed_tokens == 2
        assert_rows_equal(cut.rows, "gemma2", [*PROMPT[:length], 60, 59])
        later = await engine.step(StepCall("b", length + 2, [58], 1))
        assert_rows_equal(later.rows, "gemma2", [*PROMPT[:length], 60, 59, 58])
        for name in "ac":
            outcome = await engine.step(StepCall(name, 41, [7], 1))
            assert_rows_equal(outcome.rows, "gemma2", [*PROMPT, 50, 7])


async def test_a_part_outlives_the_session_that_has_computed_it() -> None:
    async with make_engine() as engine:
        for name in "ab":
            await begin(engine, name, [*PROMPT, 50])
        await engine.close_session("a")
        await begin(engine, "other", [9] * 30)
        outcome = await engine.step(StepCall("b", 41, [7], 1))
        assert_rows_equal(outcome.rows, "llama", [*PROMPT, 50, 7])
        assert (await begin(engine, "c", [*PROMPT, 8])).num_computed_tokens == 1


async def test_what_waits_for_sessions_to_come_makes_room_before_any_session_does() -> None:
    async with make_engine(kv_tokens=512) as engine:
        await begin(engine, "a", [*PROMPT, 50])
        await engine.close_session("a")
        for number in range(8):
            await begin(engine, f"s{number}", [10 + number] * 60)
        assert engine.load().num_evictions == 0
        assert (await engine.list_sessions(20))[1] == 8
        assert (await begin(engine, "b", [*PROMPT, 50])).num_computed_tokens == 41


async def test_closed_sessions_hold_no_more_than_their_share() -> None:
    async with make_engine(kv_tokens=1024) as engine:
        for number in range(6):
            await begin(engine, f"s{number}", [10 + number] * 40)
            await engine.close_session(f"s{number}")
        computed = [(await begin(engine, f"t{n}", [10 + n] * 40)).num_computed_tokens for n in (5, 4, 0, 1)]
        assert computed == [1, 1, 40, 40]


async def test_a_session_whose_prompt_is_still_being_fed_is_shared_as_far_as_it_is() -> None:
    async with make_engine(prefill_chunk_tokens=1) as engine:
        first = asyncio.create_task(begin(engine, "a", [*PROMPT, 50]))
        while engine.load().num_forwards < 20:
            await asyncio.sleep(0)
        second = await begin(engine, "b", [*PROMPT, 51])
        assert second.num_computed_tokens < 30
        assert_rows_equal(second.rows, "llama", [*PROMPT, 51])
        assert_rows_equal((await first).rows, "llama", [*PROMPT, 50])


async def test_exact_sessions_share_with_exact_ones_only_and_show_the_same_bits() -> None:
    async with make_engine() as engine, make_engine(shortest=0) as lonely:
        for name, is_exact in (("a", False), ("b", True)):
            assert (await begin(engine, name, [*PROMPT, 50], is_exact)).num_computed_tokens == 41
        for name, is_closed in (("c", False), ("d", True)):
            wanted = await begin(lonely, name, [*PROMPT, 51], exact=True)
            got = await begin(engine, name, [*PROMPT, 51], exact=True)
            assert got.num_computed_tokens == 1
            assert torch.equal(got.rows, wanted.rows)
            for position in range(41, 60):
                call = StepCall(name, position, [3 + position % 9], 1, exact=True)
                assert torch.equal((await engine.step(call)).rows, (await lonely.step(call)).rows)
            if not is_closed:
                await engine.close_session(name)
                await engine.close_session("b")


async def test_a_session_that_turns_exact_is_asked_for_from_its_beginning() -> None:
    async with make_engine() as engine:
        await begin(engine, "a", PROMPT)
        outcome = await engine.step_batch([StepCall("a", 40, [3], 1, exact=True)])
        assert "exact" in str(outcome[0])
        again = await begin(engine, "a", PROMPT, exact=True)
        assert again.num_computed_tokens == 40
        assert_rows_equal(again.rows, "llama", PROMPT)


async def test_nothing_is_shared_when_it_is_turned_off() -> None:
    loaded = prepare_model(copy.deepcopy(MODELS["llama"]), word_tokenizer(), name="tiny", epoch=7)
    limits = EngineLimits(share_prefixes=False, shortest_shared_tokens=8)
    async with Engine(loaded, limits) as engine:
        for name in "ab":
            assert (await begin(engine, name, [*PROMPT, 50])).num_computed_tokens == 41
            await engine.close_session(name)


async def test_scored_texts_are_not_kept() -> None:
    async with make_engine() as engine:
        async for _, rows in engine.score(PROMPT):
            assert rows.shape[1] == WIDTH
        assert (await begin(engine, "a", PROMPT)).num_computed_tokens == 40
