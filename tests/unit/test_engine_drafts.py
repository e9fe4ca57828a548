"""Rows picked by index, and models that go on by themselves within the engine: as if each token had been a step."""

from __future__ import annotations

import asyncio
import copy
import dataclasses
import math

import pytest
import torch

from fusionroute.engine import Draft, Engine, EngineLimits, StepCall, StepOutcome, prepare_model
from fusionroute.engine.kept_outcomes import KeptOutcomes
from fusionroute.engine.session import Session
from fusionroute.errors import FusionRouteError, Reason
from fusionroute.fusion import Sampling, choose
from tests.tiny_models import MAX_CONTEXT, WIDTH, eager_rows, tiny_model, word_tokenizer

PROMPT = [3, 4, 5, 6, 7, 8, 9, 10]
SAMPLED = Sampling(temperature=0.8, top_k=20, seed=11)


def make_engine(heads: bool = False, **limits: int) -> tuple[Engine, torch.nn.Module]:
    model = tiny_model("llama")
    reference = copy.deepcopy(model)
    weight = torch.randn(2, 32, generator=torch.Generator().manual_seed(1))
    loaded = prepare_model(
        model,
        word_tokenizer(),
        name="tiny",
        heads=(lambda hidden: hidden @ weight.T) if heads else None,
        epoch=7,
    )
    return Engine(loaded, EngineLimits(**limits)), reference


def assert_rows_equal(got: torch.Tensor, wanted: torch.Tensor) -> None:
    torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-5)


def continued(reference: torch.nn.Module, sampling: Sampling, count: int) -> list[int]:
    tokens = list(PROMPT)
    for _ in range(count):
        row = eager_rows(reference, tokens)[-1].numpy()
        tokens.append(choose(row, sampling, len(tokens)).token_id)
    return tokens[len(PROMPT) :]


@pytest.mark.parametrize("chunk", [2, 512])
async def test_rows_are_those_of_the_indices_however_the_tokens_are_cut_or_cached(chunk: int) -> None:
    engine, reference = make_engine(prefill_chunk_tokens=chunk)
    wanted = eager_rows(reference, PROMPT)
    async with engine:
        outcome = await engine.step(StepCall("s", 0, PROMPT, 0, row_indices=[1, 4, 6]))
        assert_rows_equal(outcome.rows, wanted[[1, 4, 6]])
        again = await engine.step(StepCall("s", 2, PROMPT[2:], 0, row_indices=[1, 5]))
        assert_rows_equal(again.rows, wanted[[3, 7]])
        assert again.num_computed_tokens == 5
        assert again.position == 8


@pytest.mark.parametrize("bad", [[2, 1], [1, 1], [-1], [0, 8]])
async def test_indices_that_name_no_token_or_none_in_order_are_refused(bad: list[int]) -> None:
    engine, _ = make_engine()
    async with engine:
        with pytest.raises(FusionRouteError, match="row_indices") as caught:
            await engine.step(StepCall("s", 0, PROMPT, 0, row_indices=bad))
        assert caught.value.reason is Reason.INVALID_FIELD
        with pytest.raises(FusionRouteError, match="num_rows"):
            await engine.step(StepCall("s", 0, PROMPT, 1, row_indices=[2]))


@pytest.mark.parametrize("sampling", [Sampling(), SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("num_rows", [0, 1, 3])
async def test_a_draft_is_what_single_steps_would_have_chosen_and_shows_the_same_rows(
    sampling: Sampling, num_rows: int
) -> None:
    engine, reference = make_engine(heads=True)
    wanted = continued(reference, sampling, 6)
    async with engine:
        outcome = await engine.step(StepCall("s", 0, PROMPT, num_rows, draft=Draft(6, sampling)))
        assert list(outcome.drafted_ids) == wanted
        assert outcome.position == len(PROMPT) + 6
        assert outcome.num_computed_tokens == len(PROMPT) + 6
        assert_rows_equal(outcome.rows, eager_rows(reference, PROMPT + wanted)[len(PROMPT) - num_rows :])
        plain = await engine.step(StepCall("t", 0, PROMPT + wanted, num_rows + 6))
        assert outcome.head_scores is not None and plain.head_scores is not None
        torch.testing.assert_close(outcome.head_scores, plain.head_scores, atol=1e-4, rtol=1e-4)


async def test_a_drafted_session_goes_on_from_any_of_its_drafted_tokens() -> None:
    engine, reference = make_engine()
    async with engine:
        drafted = (await engine.step(StepCall("s", 0, PROMPT, 1, draft=Draft(5)))).drafted_ids
        at = len(PROMPT) + 3
        outcome = await engine.step(StepCall("s", at, [40], 1))
        assert outcome.num_computed_tokens == 1
        assert_rows_equal(outcome.rows, eager_rows(reference, [*PROMPT, *drafted[:3], 40])[-1:])


async def test_drafts_of_many_sessions_share_their_forwards() -> None:
    engine, _ = make_engine()
    async with engine:
        await engine.step_batch([StepCall(f"s{number}", 0, [number + 2], 0) for number in range(8)])
        before = engine.load().num_forwards
        calls = [StepCall(f"s{number}", 1, [9], 1, draft=Draft(5)) for number in range(8)]
        outcomes = await engine.step_batch(calls)
        assert all(isinstance(o, StepOutcome) and len(o.drafted_ids) == 5 for o in outcomes)
        assert engine.load().num_forwards - before <= 8


async def test_a_draft_ends_before_a_token_that_is_not_probable_enough() -> None:
    engine, reference = make_engine()
    wanted = continued(reference, Sampling(), 12)
    logprobs = torch.log_softmax(eager_rows(reference, PROMPT + wanted), -1)
    probable = [math.exp(logprobs[len(PROMPT) - 1 + i, token]) for i, token in enumerate(wanted)]
    least = sorted(probable)[4]
    async with engine:
        draft = Draft(12, min_probability=least * 1.001)
        outcome = await engine.step(StepCall("s", 0, PROMPT, 1, draft=draft))
    expected = next(i for i, probability in enumerate(probable) if probability < least * 1.001)
    assert list(outcome.drafted_ids) == wanted[:expected]
    assert outcome.rows.shape == (1 + expected, WIDTH)


async def test_a_draft_ends_before_a_token_behind_which_nothing_follows() -> None:
    engine, reference = make_engine()
    wanted = continued(reference, Sampling(), 12)
    end = wanted[5]
    async with engine:
        draft = Draft(12, end_ids=frozenset({end, WIDTH - 1}))
        outcome = await engine.step(StepCall("s", 0, PROMPT, 1, draft=draft))
    assert list(outcome.drafted_ids) == wanted[: wanted.index(end)]
    assert len(outcome.rows) == 1 + wanted.index(end)


async def test_a_draft_ends_at_the_longest_context_and_where_running_sessions_hold_the_memory() -> None:
    engine, _ = make_engine()
    async with engine:
        outcome = await engine.step(StepCall("s", 0, [3] * (MAX_CONTEXT - 2), 1, draft=Draft(10)))
        assert outcome.position == MAX_CONTEXT
        assert len(outcome.drafted_ids) == 2
    full, _ = make_engine(kv_tokens=128, prefill_chunk_tokens=1)
    async with full:
        held = asyncio.create_task(full.step(StepCall("held", 0, [3] * 64, 1)))
        outcome = await full.step(StepCall("s", 0, [3] * 60, 1, draft=Draft(10)))
        assert outcome.position == 64
        assert len(outcome.drafted_ids) == 4
        await held


async def test_a_draft_whose_logits_turn_nan_keeps_what_was_good() -> None:
    engine, reference = make_engine()
    wanted = continued(reference, Sampling(), 8)
    fatal = next(i for i in range(1, 8) if wanted[i] not in [*PROMPT, *wanted[:i]])
    with torch.inference_mode():
        engine.model.model.get_input_embeddings().weight[wanted[fatal]] = float("nan")
    async with engine:
        outcome = await engine.step(StepCall("s", 0, PROMPT, 1, draft=Draft(8)))
        assert list(outcome.drafted_ids) == wanted[:fatal]
        assert outcome.position == len(PROMPT) + fatal
        assert_rows_equal(outcome.rows, eager_rows(reference, PROMPT + wanted[:fatal])[len(PROMPT) - 1 :])
        later = await engine.step(StepCall("s", outcome.position, [40], 1))
        assert_rows_equal(later.rows, eager_rows(reference, [*PROMPT, *wanted[:fatal], 40])[-1:])


async def test_a_kept_step_is_answered_again_without_a_forward_until_the_session_goes_on() -> None:
    engine, _ = make_engine(heads=True)
    call = StepCall("s", 0, PROMPT, 0, row_indices=[3, 7], draft=Draft(3), keep_rows=True)
    async with engine:
        first = await engine.step(call)
        before = engine.load().num_forwards
        for again in (call, dataclasses.replace(call, keep_rows=False)):
            outcome = await engine.step(again)
            assert torch.equal(outcome.rows, first.rows)
            assert outcome.head_scores is not None and torch.equal(outcome.head_scores, first.head_scores)  # type: ignore[arg-type]
            assert (outcome.drafted_ids, outcome.num_computed_tokens) == (first.drafted_ids, 0)
        assert engine.load().num_forwards == before
        other = await engine.step(dataclasses.replace(call, row_indices=[4, 7]))
        assert engine.load().num_forwards > before
        assert_rows_equal(other.rows[1:], first.rows[1:])
        await engine.step(call)
        before = engine.load().num_forwards
        await engine.step(StepCall("s", 2, [50], 1))
        assert (await engine.step(call)).num_computed_tokens > 0
        assert engine.load().num_forwards > before + 1


async def test_a_kept_step_is_for_whoever_may_step_the_session() -> None:
    engine, _ = make_engine()
    call = StepCall("s", 0, PROMPT, 1, fence=5, keep_rows=True)
    async with engine:
        await engine.step(call)
        for stranger, reason in (
            (dataclasses.replace(call, fence=4), Reason.STALE_FENCE),
            (dataclasses.replace(call, expected_epoch=8), Reason.EPOCH_MISMATCH),
        ):
            with pytest.raises(FusionRouteError) as caught:
                await engine.step(stranger)
            assert caught.value.reason is reason
        await engine.step(dataclasses.replace(call, fence=6))
        with pytest.raises(FusionRouteError, match="newer owner"):
            await engine.step(call)


def test_kept_outcomes_are_bounded_in_bytes() -> None:
    kept = KeptOutcomes(most_bytes=2 * WIDTH * 4)
    sessions = [Session(f"s{number}", 0.0) for number in range(3)]
    calls = [StepCall(session.session_id, 0, [4], 1) for session in sessions]
    for session, call in zip(sessions, calls, strict=True):
        session.extend([4])
        kept.keep(call, session, StepOutcome(torch.zeros(1, WIDTH), None, 1, 1, 0.0, 0.0, 1, 1))
    again = [kept.again(call, session) is not None for call, session in zip(calls, sessions, strict=True)]
    assert again == [False, True, True]
