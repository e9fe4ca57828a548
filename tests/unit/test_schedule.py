"""Which tokens go into a forward: decoding sessions are not kept waiting, and no prompt starves."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from typing import cast

import pytest
import torch

from fusionroute.engine import Engine, EngineLimits, StepCall, StepOutcome, prepare_model
from fusionroute.engine.schedule import DECODING_SECONDS, FEWEST_PREFILL_TOKENS, Schedule
from fusionroute.engine.sessions import NoRoomYet, SessionTable
from fusionroute.engine.steps import Chunk, Job
from fusionroute.errors import FusionRouteError, Reason
from tests.slow_models import SlowModel
from tests.tiny_models import eager_rows, tiny_model, word_tokenizer


def job(name: str, num_tokens: int, from_position: int = 0) -> Job:
    nobody = cast("asyncio.Future[StepOutcome]", None)
    return Job(StepCall(name, from_position, [3] * num_tokens, 1), 0.0, nobody)


def decode(name: str) -> Job:
    return job(name, 1, from_position=9)


def exact(name: str) -> Job:
    nobody = cast("asyncio.Future[StepOutcome]", None)
    return Job(StepCall(name, 9, [3], 1, exact=True), 0.0, nobody)


def counts(chunks: list[Chunk]) -> dict[str, int]:
    return {chunk.job.call.session_id: chunk.num_tokens for chunk in chunks}


def fed(running: list[Job], chunks: list[Chunk]) -> list[Job]:
    """The line after a forward, as the engine keeps it: those served go to its end unless they are done."""
    for chunk in chunks:
        chunk.job.num_fed = chunk.stop
        running.remove(chunk.job)
        if chunk.job.num_left:
            running.append(chunk.job)
    return running


def test_alone_a_prompt_is_fed_in_chunks_of_the_full_size() -> None:
    schedule = Schedule(EngineLimits(max_batch_tokens=2048, prefill_chunk_tokens=512))
    assert counts(schedule.compose([job("a", 2000), job("b", 600), job("c", 100)], now=0.0)) == {
        "a": 512,
        "b": 512,
        "c": 100,
    }


def test_steps_of_decoding_sessions_go_first_whatever_stands_before_them() -> None:
    schedule = Schedule(EngineLimits(max_batch_tokens=512))
    running = [job("long", 4000), decode("d0"), job("other", 4000), decode("d1")]
    assert list(counts(schedule.compose(running, now=0.0)))[:2] == ["d0", "d1"]


def test_while_others_decode_prompts_share_what_fits_into_the_wanted_time() -> None:
    schedule = Schedule(EngineLimits(mixed_forward_seconds=0.05))
    schedule.took(num_tokens=512, seconds=0.256)  # half a millisecond a token
    schedule.arrived(decode("d"), now=10.0)
    shared = schedule.compose([job("a", 4000), job("b", 4000)], now=10.1)
    assert counts(shared) == {"a": 100}
    alone = schedule.compose([job("a", 4000), job("b", 4000)], now=10.0 + DECODING_SECONDS + 0.01)
    assert counts(alone) == {"a": 512, "b": 512}


def test_the_budget_follows_the_measured_speed_within_its_bounds() -> None:
    schedule = Schedule(EngineLimits(mixed_forward_seconds=0.05, prefill_chunk_tokens=512))
    schedule.arrived(decode("d"), now=0.0)
    assert schedule.prefill_tokens(0.0) == FEWEST_PREFILL_TOKENS  # nothing is known yet
    schedule.took(num_tokens=100, seconds=10.0)
    assert schedule.prefill_tokens(0.0) == FEWEST_PREFILL_TOKENS  # prompts get on however slow it is
    for _ in range(40):
        schedule.took(num_tokens=100, seconds=0.02)
    assert schedule.prefill_tokens(0.0) == pytest.approx(250, abs=2)
    schedule.took(num_tokens=1, seconds=1.0)  # a forward of one token says nothing of prompts
    assert schedule.prefill_tokens(0.0) == pytest.approx(250, abs=2)
    for _ in range(40):
        schedule.took(num_tokens=100, seconds=0.000001)
    assert schedule.prefill_tokens(0.0) == 512


def test_a_short_prompt_does_not_make_its_session_a_decoding_one() -> None:
    schedule = Schedule(EngineLimits(max_batch_tokens=300))
    schedule.arrived(job("new", 3), now=1.0)
    assert schedule.prefill_tokens(1.0) == 300


def test_prompts_take_turns() -> None:
    schedule = Schedule(EngineLimits())
    schedule.arrived(decode("d"), now=0.0)
    running = [job("long", 400), job("short", 40), job("middle", 100)]
    order = []
    while running:
        chunks = schedule.compose(running, now=0.0)
        order.append([chunk.job.call.session_id for chunk in chunks])
        running = fed(running, chunks)
    assert order[:3] == [["long"], ["short"], ["short", "middle"]]
    assert Counter(name for names in order for name in names)["long"] == pytest.approx(400 / 32, abs=1)


def test_exact_steps_and_others_take_turns_and_never_share_a_forward() -> None:
    schedule = Schedule(EngineLimits())
    running = [decode("d0"), exact("e0"), decode("d1"), exact("e1")]
    forwards = [set(counts(schedule.compose(running, now=0.0))) for _ in range(4)]
    assert forwards == [{"e0", "e1"}, {"d0", "d1"}] * 2
    assert counts(schedule.compose([exact("e0")], now=0.0)) == {"e0": 1}
    assert counts(schedule.compose([decode("d0"), exact("e0")], now=0.0)) == {"d0": 1}


def test_prompts_get_on_when_decoding_sessions_could_fill_every_forward() -> None:
    schedule = Schedule(EngineLimits(max_batch_tokens=8))
    decoding = [decode(f"d{index}") for index in range(20)]
    taken = counts(schedule.compose([*decoding, job("long", 50)], now=0.0))
    assert taken["long"] == 2
    assert sum(taken.values()) == 8


def table(kv_tokens: int) -> SessionTable:
    return SessionTable(
        kv_tokens=kv_tokens,
        max_sessions=10,
        max_context_tokens=1024,
        logits_width=61,
        epoch=1,
        free=lambda _: None,
    )


def feed(sessions: SessionTable, name: str, start: int, num_tokens: int, now: float) -> int:
    """Feeds tokens to a session; returns what is reserved for it."""
    session, _ = sessions.begin(StepCall(name, start, [3] * num_tokens, 1), now)
    session.extend([3] * num_tokens)
    sessions.end(session, now)
    return session.reserved_tokens


def test_a_growing_session_takes_spare_room_from_the_abandoned_not_from_those_that_decode() -> None:
    sessions = table(1040)
    feed(sessions, "a", 0, 256, now=0.0)
    feed(sessions, "b", 0, 256, now=0.0)
    assert feed(sessions, "c", 0, 512, now=0.0) == 512
    assert feed(sessions, "c", 512, 1, now=1.0) == 528  # a sixteenth more would take a away; what it needs is free
    assert sessions.num_evictions == 0
    assert feed(sessions, "c", 513, 16, now=2.0) == 544  # one has to go
    assert sessions.num_evictions == 1
    assert feed(sessions, "c", 529, 16, now=3.0) == 576  # free
    assert sessions.num_evictions == 1


def test_a_growing_session_takes_the_room_of_the_abandoned_in_one_go() -> None:
    sessions = table(1040)
    for name in ("a", "b"):
        feed(sessions, name, 0, 256, now=0.0)
    feed(sessions, "c", 0, 512, now=1.0)
    assert feed(sessions, "c", 512, 1, now=60.0) == 544
    assert sessions.num_evictions == 1


def test_what_a_session_has_reserved_and_does_not_use_is_at_most_a_tenth() -> None:
    sessions = table(512)
    feed(sessions, "a", 0, 160, now=0.0)
    for position in range(160, 512):
        assert feed(sessions, "a", position, 1, now=0.0) <= 1.1 * (position + 1)


def test_whether_a_step_needs_room() -> None:
    sessions = table(256)
    assert sessions.needs_room(StepCall("a", 0, [3], 1))
    feed(sessions, "a", 0, 60, now=0.0)
    assert not sessions.needs_room(StepCall("a", 60, [3] * 4, 1))
    assert sessions.needs_room(StepCall("a", 60, [3] * 5, 1))


async def test_who_waits_longest_for_room_gets_it_first() -> None:
    """Small newcomers fit into what is free, yet must not keep it from the big one before them for ever."""
    loaded = prepare_model(tiny_model("llama"), word_tokenizer(), name="tiny", epoch=7)
    limits = EngineLimits(kv_tokens=192, prefill_chunk_tokens=1, room_wait_seconds=60.0)
    ended: list[str] = []
    async with Engine(loaded, limits) as engine:

        async def step(name: str, num_tokens: int) -> None:
            await engine.step(StepCall(name, 0, [3] * num_tokens, 1))
            ended.append(name)

        first = asyncio.create_task(step("holds", 90))
        while engine.load().num_forwards < 2:
            await asyncio.sleep(0.001)
        others = [asyncio.create_task(step("big", 90))]
        await asyncio.sleep(0)
        others += [asyncio.create_task(step(f"small{index}", 60)) for index in range(3)]
        await asyncio.gather(first, *others)
    assert ended.index("big") < 4
    assert ended[0] == "holds"


async def test_decoding_sessions_and_a_long_prompt_give_the_rows_of_undisturbed_ones() -> None:
    model = tiny_model("llama", max_position_embeddings=512)
    loaded = prepare_model(model, word_tokenizer(), name="tiny", epoch=7)
    prompt = [2 + index % 50 for index in range(400)]
    async with Engine(loaded, EngineLimits()) as engine:
        tokens = list(range(2, 30))
        await engine.step(StepCall("d", 0, tokens, 1))
        await engine.step(StepCall("d", 28, [9], 1))
        long = asyncio.create_task(engine.step(StepCall("long", 0, prompt, 1)))
        outcomes: list[StepOutcome] = []
        for index in range(12):
            outcomes.append(await engine.step(StepCall("d", 29 + index, [10 + index], 1)))
        done = await long
    assert done.num_forwards > 1
    wanted = eager_rows(model, [*tokens, 9, *range(10, 22)])
    for index, outcome in enumerate(outcomes):
        torch.testing.assert_close(outcome.rows, wanted[29 + index : 30 + index], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(done.rows, eager_rows(model, prompt)[-1:], atol=2e-5, rtol=2e-5)


async def test_a_prompt_that_expires_in_its_middle_is_dropped_there() -> None:
    loaded = prepare_model(tiny_model("llama"), word_tokenizer(), name="tiny", epoch=7)
    async with Engine(SlowModel(loaded, 0.004), EngineLimits(prefill_chunk_tokens=1)) as engine:
        with pytest.raises(FusionRouteError) as caught:
            await engine.step(StepCall("s", 0, [3] * 90, 1, deadline=time.monotonic() + 0.1))
        assert caught.value.reason is Reason.DEADLINE_PASSED
        assert engine.load().num_forwards < 90
        assert engine.load().queue_depth == 0
        assert (await engine.step(StepCall("s", 0, [4], 1))).position == 1


def test_room_is_awaited_only_by_those_who_need_it() -> None:
    sessions = table(128)
    busy, _ = sessions.begin(StepCall("a", 0, [3] * 100, 1), 0.0)
    with pytest.raises(NoRoomYet):
        sessions.begin(StepCall("b", 0, [3] * 60, 1), 0.0)
    sessions.end(busy, 0.0)
    sessions.begin(StepCall("b", 0, [3] * 60, 1), 0.0)


def test_a_group_is_of_sessions_that_decode_and_takes_the_oldest_of_them() -> None:
    schedule = Schedule(EngineLimits())
    running = [decode("a"), job("prompt", 8), decode("b"), decode("c"), job("other prompt", 8)]
    assert counts(schedule.compose(running, now=0.0, most_decoding=2)) == {
        "a": 1, "prompt": 8, "b": 1, "other prompt": 8
    }  # fmt: skip
