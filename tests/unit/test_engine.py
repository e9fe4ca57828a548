"""The engine's rows equal those of plain eager forwards, however the tokens come in."""

from __future__ import annotations

import asyncio
import copy
import random
import time
from contextlib import suppress

import pytest
import torch

from fusionroute.engine import Engine, EngineLimits, StepCall, StepOutcome, digest, prepare_model
from fusionroute.errors import FusionRouteError, Reason
from tests.slow_models import SlowModel
from tests.tiny_models import MAX_CONTEXT, WIDTH, eager_rows, tiny_model, word_tokenizer

FAMILIES = ["llama", "gemma2", "qwen2", "qwen3"]
TOLERANCE = 1e-5


def make_engine(family: str = "llama", **limits: int) -> tuple[Engine, torch.nn.Module]:
    model = tiny_model(family)
    reference = copy.deepcopy(model)
    loaded = prepare_model(model, word_tokenizer(), name=f"tiny-{family}", epoch=7)
    return Engine(loaded, EngineLimits(**limits)), reference


def random_tokens(rng: random.Random, count: int) -> list[int]:
    return [rng.randrange(2, WIDTH) for _ in range(count)]


def assert_rows_equal(got: torch.Tensor, wanted: torch.Tensor) -> None:
    torch.testing.assert_close(got, wanted, atol=TOLERANCE, rtol=TOLERANCE)


@pytest.mark.parametrize("family", FAMILIES)
async def test_rows_of_sixteen_interleaved_sessions_equal_eager_rows(family: str) -> None:
    engine, reference = make_engine(family, prefill_chunk_tokens=5, max_batch_tokens=24)
    rng = random.Random(family)
    async with engine:

        async def one_session(number: int) -> None:
            tokens = random_tokens(rng, rng.randrange(20, 60))
            wanted = eager_rows(reference, tokens)
            position = 0
            while position < len(tokens):
                count = min(rng.choice([1, 1, 1, 2, 9, 17]), len(tokens) - position)
                num_rows = rng.randrange(1, count + 1)
                outcome = await engine.step(
                    StepCall(f"s{number}", position, tokens[position : position + count], num_rows)
                )
                position += count
                assert outcome.position == position
                assert_rows_equal(outcome.rows, wanted[position - num_rows : position])

        await asyncio.gather(*(one_session(number) for number in range(16)))
        assert engine.load().num_sessions == 16


async def test_steps_of_many_sessions_share_one_forward() -> None:
    engine, _ = make_engine()
    async with engine:
        sessions = [f"s{number}" for number in range(8)]
        await asyncio.gather(*(engine.step(StepCall(name, 0, [5, 6], 1)) for name in sessions))
        before = engine.load().num_forwards
        outcomes = await engine.step_batch([StepCall(name, 2, [7], 1) for name in sessions])
        assert {o.max_batch_sessions for o in outcomes if isinstance(o, StepOutcome)} == {8}
        assert engine.load().num_forwards - before == 1


async def test_steps_that_become_ready_in_one_turn_of_the_event_loop_share_a_forward() -> None:
    """However long that turn takes: the worker is idle meanwhile, and must not begin with the first of them."""
    engine, _ = make_engine()

    async def ready(name: str) -> StepOutcome:
        time.sleep(0.02)  # noqa: ASYNC251 - what an event loop does before it steps a session again
        return await engine.step(StepCall(name, 0, [5, 6], 1))

    async with engine:
        outcomes = await asyncio.gather(*(ready(f"s{number}") for number in range(5)))
    assert {outcome.max_batch_sessions for outcome in outcomes} == {5}


async def test_an_engine_that_is_left_answers_whoever_has_stepped_in_the_same_turn() -> None:
    engine, _ = make_engine()
    async with engine:
        stepped = asyncio.ensure_future(engine.step(StepCall("s", 0, [5, 6], 1)))
        await asyncio.sleep(0)
    with suppress(FusionRouteError):  # answered or refused
        await asyncio.wait_for(stepped, 20)


async def test_a_rolled_back_session_continues_as_if_the_tokens_had_never_been_fed() -> None:
    engine, reference = make_engine("gemma2")
    async with engine:
        await engine.step(StepCall("s", 0, [3, 4, 5, 6, 7, 8, 9, 10, 11], 0))
        outcome = await engine.step(StepCall("s", 4, [20, 21], 2))
        assert outcome.position == 6
        assert_rows_equal(outcome.rows, eager_rows(reference, [3, 4, 5, 6, 20, 21])[-2:])


async def test_a_repeated_step_computes_only_the_rows_it_must_return() -> None:
    engine, _ = make_engine()
    async with engine:
        first = await engine.step(StepCall("s", 0, list(range(2, 30)), 2))
        again = await engine.step(StepCall("s", 0, list(range(2, 30)), 2))
        assert again.num_computed_tokens == 2
        assert again.position == first.position
        assert_rows_equal(again.rows, first.rows)
        nothing = await engine.step(StepCall("s", 0, list(range(2, 30)), 0))
        assert nothing.num_computed_tokens == 0
        assert nothing.rows.shape == (0, WIDTH)


async def test_evicted_sessions_are_unknown_and_replay_gives_the_same_rows() -> None:
    engine, _ = make_engine(kv_tokens=256)
    async with engine:
        first = {}
        for number in range(8):
            outcome = await engine.step(StepCall(f"s{number}", 0, list(range(2, 40)), 1))
            first[number] = outcome.rows
        load = engine.load()
        assert load.num_evictions == 3  # 38 tokens take 48
        assert load.kv_tokens_used <= 256
        with pytest.raises(FusionRouteError) as caught:
            await engine.step(StepCall("s0", 38, [3], 1))
        assert caught.value.reason is Reason.SESSION_UNKNOWN
        replayed = await engine.step(StepCall("s0", 0, list(range(2, 40)), 1))
        assert_rows_equal(replayed.rows, first[0])


async def test_a_long_session_grows_without_losing_its_cache() -> None:
    engine, reference = make_engine()
    tokens = random_tokens(random.Random(1), MAX_CONTEXT)
    wanted = eager_rows(reference, tokens)
    async with engine:
        for position, token in enumerate(tokens):
            outcome = await engine.step(StepCall("s", position, [token], 1))
            assert_rows_equal(outcome.rows, wanted[position : position + 1])
        with pytest.raises(FusionRouteError) as caught:
            await engine.step(StepCall("s", MAX_CONTEXT, [3], 1))
        assert caught.value.reason is Reason.CONTEXT_FULL
        assert str(MAX_CONTEXT) in caught.value.message


async def test_weights_that_turn_nan_fail_the_step_and_leave_the_session_as_it_was() -> None:
    engine, reference = make_engine()
    async with engine:
        await engine.step(StepCall("s", 0, [3, 4, 5], 1))
        head = engine.model.model.get_output_embeddings()
        kept = head.weight.detach().clone()
        with torch.inference_mode():
            head.weight.fill_(float("nan"))
        with pytest.raises(FusionRouteError) as caught:
            await engine.step(StepCall("s", 3, [6], 1))
        assert caught.value.reason is Reason.NON_FINITE_LOGITS
        with torch.inference_mode():
            head.weight.copy_(kept)
        outcome = await engine.step(StepCall("s", 3, [6], 1))
        assert_rows_equal(outcome.rows, eager_rows(reference, [3, 4, 5, 6])[-1:])


async def test_work_whose_deadline_has_passed_is_dropped_before_the_forward() -> None:
    engine, _ = make_engine()
    async with engine:
        with pytest.raises(FusionRouteError) as caught:
            await engine.step(StepCall("s", 0, [3], 1, deadline=0.0))
        assert caught.value.reason is Reason.DEADLINE_PASSED
        assert engine.load().num_forwards == 0
        assert engine.load().queue_depth == 0


async def test_a_full_queue_refuses_with_a_hint() -> None:
    engine, _ = make_engine(max_queue=4)
    async with engine:
        calls = [StepCall(f"s{number}", 0, [3, 4], 1) for number in range(12)]
        outcomes = await engine.step_batch(calls)
    refused = [o for o in outcomes if isinstance(o, FusionRouteError)]
    assert refused
    assert all(error.reason is Reason.QUEUE_FULL and error.retry_after_seconds for error in refused)


async def test_a_cancelled_step_leaves_the_session_usable() -> None:
    engine, reference = make_engine(prefill_chunk_tokens=1)
    async with engine:
        long = [2 + index % 58 for index in range(90)]  # forwards of one token take well below a millisecond
        task = asyncio.create_task(engine.step(StepCall("s", 0, long, 1)))
        while engine.load().num_forwards < 3:
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        while engine.load().queue_depth:
            await asyncio.sleep(0.001)
        outcome = await engine.step(StepCall("s", 0, [2, 3, 4, 50], 1))
        assert_rows_equal(outcome.rows, eager_rows(reference, [2, 3, 4, 50])[-1:])


async def test_a_draining_engine_finishes_what_waits_and_refuses_the_rest() -> None:
    engine, _ = make_engine(prefill_chunk_tokens=2)
    async with engine:
        task = asyncio.create_task(engine.step(StepCall("s", 0, list(range(2, 40)), 1)))
        await asyncio.sleep(0)
        await engine.drain(timeout_seconds=10)
        assert (await task).position == 38
        with pytest.raises(FusionRouteError) as caught:
            await engine.step(StepCall("t", 0, [3], 1))
        assert caught.value.reason is Reason.DRAINING


async def test_scoring_gives_the_rows_of_the_whole_sequence_and_keeps_no_session() -> None:
    engine, reference = make_engine("qwen2")
    tokens = random_tokens(random.Random(2), 50)
    async with engine:
        parts = [(start, rows) async for start, rows in engine.score(tokens, chunk_tokens=16)]
        assert [start for start, _ in parts] == [0, 16, 32, 48]
        assert_rows_equal(torch.cat([rows for _, rows in parts]), eager_rows(reference, tokens))
        assert engine.load().num_sessions == 0


async def test_room_held_by_running_steps_is_waited_for() -> None:
    engine, reference = make_engine(kv_tokens=64, prefill_chunk_tokens=4)
    async with engine:
        calls = [StepCall(f"s{number}", 0, [number + 2] * 33, 1) for number in range(6)]
        outcomes = await engine.step_batch(calls)
    for call, outcome in zip(calls, outcomes, strict=True):
        assert isinstance(outcome, StepOutcome)
        assert_rows_equal(outcome.rows, eager_rows(reference, list(call.token_ids))[-1:])


async def test_a_step_that_waits_in_vain_for_room_is_refused_with_a_hint() -> None:
    model = prepare_model(tiny_model("llama"), word_tokenizer(), name="tiny", epoch=7)
    async with Engine(
        SlowModel(model, 0.004), EngineLimits(kv_tokens=64, prefill_chunk_tokens=1, room_wait_seconds=0.0)
    ) as engine:
        long = asyncio.create_task(engine.step(StepCall("long", 0, list(range(2, 60)), 1)))
        while engine.load().num_forwards < 3:
            await asyncio.sleep(0.001)
        with pytest.raises(FusionRouteError) as caught:
            await engine.step(StepCall("other", 0, [3, 4], 1))
        assert caught.value.reason is Reason.KV_MEMORY_FULL
        assert caught.value.retry_after_seconds is not None
        assert (await long).position == 58
        assert (await engine.step(StepCall("other", 0, [3, 4], 1))).position == 2


async def test_digest_of_other_tokens_is_refused() -> None:
    engine, _ = make_engine()
    async with engine:
        await engine.step(StepCall("s", 0, [3, 4, 5], 1))
        await engine.step(StepCall("s", 3, [6], 1, prefix_digest=digest([3, 4, 5])))
        with pytest.raises(FusionRouteError) as caught:
            await engine.step(StepCall("s", 4, [7], 1, prefix_digest=digest([3, 4, 5, 5])))
        assert caught.value.reason is Reason.DIGEST_MISMATCH


async def test_a_question_whose_asker_has_left_neither_stops_the_engine_nor_is_forgotten() -> None:
    engine, _ = make_engine(prefill_chunk_tokens=1)
    async with engine:
        await engine.step(StepCall("left", 0, [3], 1))
        long = asyncio.create_task(engine.step(StepCall("s", 0, list(range(2, 60)), 1)))
        await asyncio.sleep(0)
        closing = asyncio.create_task(engine.close_session("left"))
        await asyncio.sleep(0)
        closing.cancel()
        assert (await long).position == 58
        views, _ = await engine.list_sessions(10)
        assert [view.session_id for view in views] == ["s"]
