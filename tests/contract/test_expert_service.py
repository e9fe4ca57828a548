"""The whole truth table of Step, and scoring, over a real model and a real connection."""

from __future__ import annotations

import asyncio
import copy
from collections.abc import AsyncIterator
from typing import Any

import grpc
import numpy as np
import pytest
import torch

from expert_service.servicer import ExpertServicer
from fusionroute.engine import Engine, EngineLimits, digest, prepare_model
from fusionroute.errors import FusionRouteError, Reason, Unavailable
from fusionroute.grpc_runtime import error_from_rpc
from fusionroute.v1 import expert_pb2
from fusionroute.wire import matrix_to_numpy, step_error_from_message
from tests.expert_fakes import served_expert, until
from tests.tiny_models import MAX_CONTEXT, WIDTH, eager_rows, tiny_model, word_tokenizer

EPOCH = 7
TOKENS = [3, 14, 15, 9, 26, 5, 35, 8, 9, 7, 9, 32]


class Expert:
    """A served expert with the model's own rows to compare with."""

    def __init__(self, stub: Any, engine: Engine, servicer: ExpertServicer, reference: Any) -> None:
        self.stub = stub
        self.engine = engine
        self.servicer = servicer
        self._reference = reference

    async def step(self, session_id: str, start: int, token_ids: list[int], **fields: Any) -> Any:
        request = expert_pb2.StepRequest(
            session_id=session_id, from_position=start, token_ids=token_ids, **({"num_rows": 1} | fields)
        )
        return await self.stub.Step(request, timeout=30)

    def rows(self, token_ids: list[int]) -> np.ndarray[Any, Any]:
        """Logits [tokens, width] of the model without any of our code."""
        return eager_rows(self._reference, token_ids).numpy()


@pytest.fixture
async def expert() -> AsyncIterator[Expert]:
    model = tiny_model("llama")
    reference = copy.deepcopy(model)
    loaded = prepare_model(model, word_tokenizer(), name="tiny", epoch=EPOCH)
    limits = EngineLimits(kv_tokens=256, prefill_chunk_tokens=2, room_wait_seconds=0.2)
    async with Engine(loaded, limits) as engine, served_expert(engine) as (stub, _, servicer):
        yield Expert(stub, engine, servicer, reference)


async def refusal(call: Any) -> FusionRouteError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return error_from_rpc(caught.value)


def assert_rows(response: Any, wanted: np.ndarray[Any, Any]) -> None:
    np.testing.assert_allclose(matrix_to_numpy(response.rows, WIDTH), wanted, atol=1e-5, rtol=1e-5)


async def test_prefill_then_decoding_gives_the_models_own_rows(expert: Expert) -> None:
    wanted = expert.rows(TOKENS)
    assert_rows(await expert.step("s", 0, TOKENS[:8], num_rows=3), wanted[5:8])
    for position in range(8, len(TOKENS)):
        response = await expert.step("s", position, [TOKENS[position]])
        assert_rows(response, wanted[position : position + 1])
        assert (response.position, response.epoch, response.num_computed_tokens) == (position + 1, EPOCH, 1)


async def test_a_rollback_answers_as_if_the_rejected_tokens_had_never_been(expert: Expert) -> None:
    await expert.step("s", 0, TOKENS)
    changed = [*TOKENS[:5], 40, 41]
    response = await expert.step("s", 5, [40, 41], num_rows=2)
    assert_rows(response, expert.rows(changed)[5:])
    assert response.position == 7


async def test_the_same_step_again_is_answered_with_only_its_rows_computed_again(expert: Expert) -> None:
    first = await expert.step("s", 0, TOKENS)
    again = await expert.step("s", 0, TOKENS)
    assert_rows(again, matrix_to_numpy(first.rows, WIDTH))
    assert (first.num_computed_tokens, again.num_computed_tokens) == (len(TOKENS), 1)


async def test_a_lost_session_says_so_and_a_replay_restores_it(expert: Expert) -> None:
    await expert.step("s", 0, TOKENS[:8])
    await expert.stub.CloseSession(expert_pb2.CloseSessionRequest(session_id="s"))
    error = await refusal(expert.step("s", 8, [TOKENS[8]]))
    assert (error.reason, error.code.name) == (Reason.SESSION_UNKNOWN, "NOT_FOUND")
    assert_rows(await expert.step("s", 0, TOKENS[:9]), expert.rows(TOKENS)[8:9])


async def test_a_position_ahead_is_told_the_cached_length(expert: Expert) -> None:
    await expert.step("s", 0, TOKENS[:5])
    error = await refusal(expert.step("s", 9, [1]))
    assert (error.reason, error.cached_length) == (Reason.POSITION_AHEAD, 5)
    assert_rows(await expert.step("s", 5, TOKENS[5:]), expert.rows(TOKENS)[-1:])


async def test_a_digest_of_other_tokens_is_refused_and_the_right_one_passes(expert: Expert) -> None:
    await expert.step("s", 0, TOKENS[:5])
    error = await refusal(expert.step("s", 5, [1], prefix_digest=digest([9, 9, 9, 9, 9])))
    assert error.reason is Reason.DIGEST_MISMATCH
    response = await expert.step("s", 5, [TOKENS[5]], prefix_digest=digest(TOKENS[:5]))
    assert response.position == 6


async def test_a_stale_fence_is_refused_for_steps_and_for_closing(expert: Expert) -> None:
    await expert.step("s", 0, TOKENS[:5], fence=4)
    assert (await refusal(expert.step("s", 5, [1], fence=3))).reason is Reason.STALE_FENCE
    close = expert_pb2.CloseSessionRequest(session_id="s", fence=3)
    assert (await refusal(expert.stub.CloseSession(close))).reason is Reason.STALE_FENCE
    assert (await expert.step("s", 5, [1], fence=5)).position == 6


async def test_another_epoch_is_refused(expert: Expert) -> None:
    error = await refusal(expert.step("s", 0, TOKENS, expected_epoch=EPOCH + 1))
    assert error.reason is Reason.EPOCH_MISMATCH
    assert (await expert.step("s", 0, TOKENS, expected_epoch=EPOCH)).position == len(TOKENS)


async def test_a_second_step_of_a_session_is_refused_while_the_first_one_runs(expert: Expert) -> None:
    long = (TOKENS * 8)[:90]
    outcomes = await asyncio.gather(*(expert.step("s", 0, long) for _ in range(6)), return_exceptions=True)
    busy = [error_from_rpc(o) for o in outcomes if isinstance(o, grpc.aio.AioRpcError)]
    served = [o for o in outcomes if not isinstance(o, BaseException)]
    assert served
    assert busy
    assert {error.reason for error in busy} == {Reason.SESSION_BUSY}
    assert all(error.retry_after_seconds for error in busy)
    for response in served:
        assert_rows(response, expert.rows(long)[-1:])


@pytest.mark.parametrize(
    ("token_ids", "fields", "reason"),
    [
        ([], {"num_rows": 0}, Reason.INVALID_FIELD),
        ([3, WIDTH], {}, Reason.TOKEN_OUT_OF_RANGE),
        ([3], {"num_rows": 2}, Reason.INVALID_FIELD),
        ([3] * (MAX_CONTEXT - 3), {}, Reason.CONTEXT_FULL),
        ([3], {"draft_tokens": MAX_CONTEXT - 4}, Reason.INVALID_FIELD),
        ([3] * 40, {"draft_tokens": 60}, Reason.CONTEXT_FULL),
    ],
)
async def test_a_bad_value_is_refused_and_the_session_is_untouched(
    expert: Expert, token_ids: list[int], fields: dict[str, int], reason: Reason
) -> None:
    await expert.step("s", 0, TOKENS[:4])
    assert (await refusal(expert.step("s", 4, token_ids, **fields))).reason is reason
    listed = (await expert.stub.ListSessions(expert_pb2.ListSessionsRequest())).sessions
    assert [(s.session_id, s.cached_length, s.busy) for s in listed] == [("s", 4, False)]


async def test_drafting_equals_greedy_decoding_and_can_be_cut_back(expert: Expert) -> None:
    response = await expert.step("s", 0, TOKENS, num_rows=1, draft_tokens=6)
    greedy = list(TOKENS)
    for _ in range(6):
        greedy.append(int(expert.rows(greedy)[-1].argmax()))
    assert list(response.drafted_ids) == greedy[len(TOKENS) :]
    assert_rows(response, expert.rows(greedy)[len(TOKENS) - 1 :])
    assert response.position == len(greedy)
    rejected = [*greedy[: len(TOKENS) + 2], 44]
    assert_rows(await expert.step("s", len(TOKENS) + 2, [44]), expert.rows(rejected)[-1:])


async def test_a_batch_equals_single_steps_with_failures_apart(expert: Expert) -> None:
    prompts = {f"s{index}": TOKENS[: 3 + index] for index in range(6)}
    steps = [
        expert_pb2.StepRequest(session_id=name, token_ids=ids, num_rows=1) for name, ids in prompts.items()
    ]
    steps.insert(2, expert_pb2.StepRequest(session_id="lost", from_position=4, token_ids=[1]))
    results = list((await expert.stub.StepBatch(expert_pb2.StepBatchRequest(steps=steps))).results)
    assert step_error_from_message(results.pop(2).error).reason is Reason.SESSION_UNKNOWN
    for result, token_ids in zip(results, prompts.values(), strict=True):
        assert_rows(result.response, expert.rows(token_ids)[-1:])


async def test_an_evicted_session_replays_to_the_same_rows(expert: Expert) -> None:
    prompt = (TOKENS * 5)[:60]
    for name in "abcdef":
        await expert.step(name, 0, prompt)
    assert (await expert.stub.GetInfo(expert_pb2.GetInfoRequest())).load.num_evictions > 0
    assert (await refusal(expert.step("a", 60, [1]))).reason is Reason.SESSION_UNKNOWN
    assert_rows(await expert.step("a", 0, [*prompt, 1]), expert.rows([*prompt, 1])[-1:])


async def test_scores_equal_the_models_own_log_softmax(expert: Expert) -> None:
    sequences = [TOKENS, TOKENS[::-1], [5, 6], (TOKENS * 8)[:MAX_CONTEXT]]
    request = expert_pb2.ScoreRequest(
        sequences=[expert_pb2.TokenSequence(token_ids=ids) for ids in sequences],
        output=expert_pb2.SCORE_OUTPUT_ROWS,
    )
    answers = [answer async for answer in expert.stub.Score(request)]
    for index, token_ids in enumerate(sequences):
        mine = [answer for answer in answers if answer.sequence_index == index]
        wanted = torch.from_numpy(expert.rows(token_ids)[:-1])
        gold = torch.log_softmax(wanted, dim=1)[range(len(token_ids) - 1), token_ids[1:]]
        scored = np.concatenate([np.frombuffer(answer.gold_log_probs, "<f4") for answer in mine])
        np.testing.assert_allclose(scored, gold.numpy(), atol=1e-5, rtol=1e-5)
        assert [i for answer in mine for i in answer.argmax_ids] == wanted.argmax(dim=1).tolist()
        rows = np.concatenate([matrix_to_numpy(answer.rows, WIDTH) for answer in mine])
        np.testing.assert_allclose(rows, wanted.numpy(), atol=1e-5, rtol=1e-5)
        assert {answer.epoch for answer in mine} == {EPOCH}


async def test_scoring_leaves_no_session_behind_even_when_the_client_leaves(expert: Expert) -> None:
    request = expert_pb2.ScoreRequest(sequences=[expert_pb2.TokenSequence(token_ids=(TOKENS * 8)[:90])] * 20)
    for _ in range(5):
        stream = expert.stub.Score(request)
        await stream.read()
        stream.cancel()
    await until(lambda: expert.engine.load().num_sessions == 0)
    assert (await expert.step("s", 0, TOKENS)).position == len(TOKENS)


async def test_a_deadline_that_has_passed_is_not_computed(expert: Expert) -> None:
    before = expert.engine.load().num_forwards
    request = expert_pb2.StepRequest(session_id="s", token_ids=TOKENS, num_rows=1)
    with expert.engine._worker._turn, pytest.raises(grpc.aio.AioRpcError) as caught:  # it cannot begin before
        await expert.stub.Step(request, timeout=0.02)
    await expert.engine.drain(10)
    assert isinstance(error_from_rpc(caught.value), Unavailable)
    assert error_from_rpc(caught.value).reason is Reason.DEADLINE_PASSED
    assert expert.engine.load().num_forwards == before


async def test_a_draining_expert_refuses_new_steps_and_finishes_the_running_ones(expert: Expert) -> None:
    long = (TOKENS * 8)[:90]
    steps = [expert_pb2.StepRequest(session_id=name, token_ids=long, num_rows=1) for name in "ab"]
    running = asyncio.ensure_future(expert.stub.StepBatch(expert_pb2.StepBatchRequest(steps=steps)))
    async with asyncio.timeout(10):
        while expert.engine.load().queue_depth == 0:
            await asyncio.sleep(0)
    await expert.engine.drain(10)
    error = await refusal(expert.step("late", 0, TOKENS))
    assert (error.reason, error.code.name) == (Reason.DRAINING, "UNAVAILABLE")
    for result in (await running).results:
        assert_rows(result.response, expert.rows(long)[-1:])
