"""The expert's servicer over an engine with known logits: it translates, and refuses before computing."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Any

import grpc
import numpy as np
import pytest
import torch
from grpc_health.v1 import health_pb2, health_pb2_grpc

from fusionroute.errors import FusionRouteError, InternalFault, OutOfRoom, Reason
from fusionroute.grpc_runtime import channel, error_from_rpc
from fusionroute.v1 import common_pb2, expert_pb2
from fusionroute.wire import matrix_to_numpy, step_error_from_message
from tests.expert_fakes import WIDTH, KnownEngine, served_expert, successor, until

Step = expert_pb2.StepRequest
UNKNOWN_DTYPE: Any = 9


@pytest.fixture
def engine() -> KnownEngine:
    return KnownEngine()


@pytest.fixture
async def expert(engine: KnownEngine) -> AsyncIterator[Any]:
    async with served_expert(engine, max_message_bytes=65536) as (stub, _, _):
        yield stub


async def refusal(call: Any) -> FusionRouteError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return error_from_rpc(caught.value)


async def test_info_tells_model_slot_and_load(expert: Any) -> None:
    info = await expert.GetInfo(expert_pb2.GetInfoRequest())
    assert (info.slot, info.draining, info.load.queue_limit) == ("math", False, 8)
    assert (info.model.logits_width, info.model.epoch, info.model.name) == (WIDTH, 5, "known")


async def test_every_field_of_a_step_reaches_the_engine(expert: Any, engine: KnownEngine) -> None:
    engine.lengths["s"] = 7
    request = Step(
        session_id="s",
        from_position=7,
        token_ids=[3, 4],
        num_rows=1,
        expected_epoch=5,
        fence=6,
        prefix_digest=0,
    )
    response = await expert.Step(request, timeout=30)
    call = engine.calls[0]
    assert (call.session_id, call.from_position, list(call.token_ids), call.num_rows) == ("s", 7, [3, 4], 1)
    assert (call.expected_epoch, call.fence, call.prefix_digest) == (5, 6, 0)
    assert call.deadline is not None
    # gRPC rounds timeouts up on the wire.
    assert 0 < call.deadline - time.monotonic() < 31
    assert (response.position, response.epoch, response.num_computed_tokens) == (9, 5, 2)
    timings = response.timings
    assert (timings.queue_seconds, timings.forward_seconds, timings.num_forwards) == (0.5, 0.25, 1)


async def test_a_digest_or_deadline_that_was_not_given_is_none(expert: Any, engine: KnownEngine) -> None:
    await expert.Step(Step(session_id="s", token_ids=[3]))
    assert engine.calls[0].prefix_digest is None
    assert engine.calls[0].deadline is None


@pytest.mark.parametrize("num_rows", [0, 1, 2])
async def test_drafting_feeds_the_experts_own_choices_and_returns_their_rows(
    expert: Any, engine: KnownEngine, num_rows: int
) -> None:
    response = await expert.Step(Step(session_id="s", token_ids=[3, 4], num_rows=num_rows, draft_tokens=3))
    first, second, third = successor(4), successor(successor(4)), successor(successor(successor(4)))
    assert list(response.drafted_ids) == [first, second, third]
    wanted = engine.rows([*[3, 4][2 - num_rows :], first, second, third]).numpy()
    np.testing.assert_array_equal(matrix_to_numpy(response.rows, WIDTH), wanted)
    assert response.position == 5
    assert response.timings.num_forwards == 4


async def test_rows_travel_in_the_format_asked_for_or_the_models_own() -> None:
    async with served_expert(KnownEngine("bfloat16")) as (stub, _, _):
        own = await stub.Step(Step(session_id="a", token_ids=[3], num_rows=1))
        asked = await stub.Step(
            Step(session_id="b", token_ids=[3], num_rows=1, dtype=common_pb2.DTYPE_FLOAT32)
        )
    assert own.rows.dtype == common_pb2.DTYPE_BFLOAT16
    assert asked.rows.dtype == common_pb2.DTYPE_FLOAT32
    np.testing.assert_array_equal(matrix_to_numpy(own.rows, WIDTH), matrix_to_numpy(asked.rows, WIDTH))


@pytest.mark.parametrize("session_id", ["", "a" * 129, "a b", "a\n", "ä", "a/b"])
async def test_a_bad_session_id_is_refused_by_every_call(
    expert: Any, engine: KnownEngine, session_id: str
) -> None:
    for call in (
        expert.Step(Step(session_id=session_id, token_ids=[3])),
        expert.CloseSession(expert_pb2.CloseSessionRequest(session_id=session_id)),
    ):
        error = await refusal(call)
        assert (error.reason, error.metadata["field"]) == (Reason.INVALID_FIELD, "session_id")
    assert not engine.calls


@pytest.mark.parametrize(
    ("request_", "reason", "field"),
    [
        (Step(session_id="s", token_ids=[3], draft_tokens=65), Reason.INVALID_FIELD, "draft_tokens"),
        (Step(session_id="s", token_ids=[3], dtype=UNKNOWN_DTYPE), Reason.INVALID_FIELD, "dtype"),
        (Step(session_id="s", from_position=960, token_ids=[3], draft_tokens=40), Reason.CONTEXT_FULL, None),
        (Step(session_id="s", token_ids=[3] * 1200, num_rows=1200), Reason.INVALID_FIELD, "num_rows"),
        (Step(session_id="s", token_ids=[3], num_rows=2**32 - 1), Reason.INVALID_FIELD, "num_rows"),
    ],
)
async def test_what_cannot_be_answered_is_refused_before_the_engine_sees_it(
    expert: Any, engine: KnownEngine, request_: Step, reason: Reason, field: str | None
) -> None:
    error = await refusal(expert.Step(request_))
    assert (error.reason, error.metadata.get("field")) == (reason, field)
    assert not engine.calls


async def test_a_batch_answers_in_order_and_one_failure_hinders_nobody(
    expert: Any, engine: KnownEngine
) -> None:
    engine.lengths["b"] = 3
    steps = [
        Step(session_id="a", token_ids=[3], num_rows=1),
        Step(session_id="b", from_position=9, token_ids=[3]),
        Step(session_id="not allowed", token_ids=[3]),
        Step(session_id="d", token_ids=[4], num_rows=1, draft_tokens=1),
    ]
    results = (await expert.StepBatch(expert_pb2.StepBatchRequest(steps=steps))).results
    assert [result.WhichOneof("result") for result in results] == ["response", "error", "error", "response"]
    ahead, bad_id = (step_error_from_message(results[index].error) for index in (1, 2))
    assert (ahead.reason, ahead.cached_length) == (Reason.POSITION_AHEAD, 3)
    assert (bad_id.reason, bad_id.metadata["field"]) == (Reason.INVALID_FIELD, "session_id")
    assert list(results[3].response.drafted_ids) == [successor(4)]


@pytest.mark.parametrize(
    ("session_ids", "message"),
    [
        ([], "0 steps"),
        ([f"s{index}" for index in range(257)], "257 steps"),
        (["a", "b", "a"], "2 steps of session 'a'"),
    ],
)
async def test_a_batch_is_1_to_256_steps_of_different_sessions(
    expert: Any, engine: KnownEngine, session_ids: list[str], message: str
) -> None:
    steps = [Step(session_id=session_id, token_ids=[3]) for session_id in session_ids]
    error = await refusal(expert.StepBatch(expert_pb2.StepBatchRequest(steps=steps)))
    assert error.metadata["field"] == "steps"
    assert message in error.message
    assert not engine.calls


async def test_a_batch_whose_rows_together_are_too_many_is_refused(expert: Any, engine: KnownEngine) -> None:
    steps = [Step(session_id=f"s{index}", token_ids=[3] * 600, num_rows=600) for index in range(2)]
    error = await refusal(expert.StepBatch(expert_pb2.StepBatchRequest(steps=steps)))
    assert "max_message_bytes = 65536" in error.message
    assert not engine.calls


async def test_sessions_are_listed_and_closed(expert: Any, engine: KnownEngine) -> None:
    engine.lengths.update(a=3, b=4)
    listed = await expert.ListSessions(expert_pb2.ListSessionsRequest(limit=1))
    assert [(s.session_id, s.cached_length, s.fence) for s in listed.sessions] == [("a", 3, 2)]
    assert listed.num_sessions == 2
    assert len((await expert.ListSessions(expert_pb2.ListSessionsRequest())).sessions) == 2
    close = expert_pb2.CloseSessionRequest(session_id="a")
    assert (await expert.CloseSession(close)).existed
    assert not (await expert.CloseSession(close)).existed


async def test_a_client_that_hangs_up_does_not_stop_the_closing_of_its_session(
    expert: Any, engine: KnownEngine
) -> None:
    engine.lengths["s"] = 3
    engine.closing_gate.clear()
    closing = expert.CloseSession(expert_pb2.CloseSessionRequest(session_id="s"))
    await until(lambda: engine.num_closing == 1)
    closing.cancel()
    await asyncio.sleep(0.1)
    engine.closing_gate.set()
    await until(lambda: engine.lengths == {})


def expected_log_probs(engine: KnownEngine, token_ids: list[int]) -> np.ndarray[Any, Any]:
    log_probs = torch.log_softmax(engine.rows(token_ids[:-1]), dim=1)
    return log_probs[range(len(token_ids) - 1), token_ids[1:]].numpy()


async def test_scores_of_many_sequences_come_in_order_with_log_softmax_values(
    expert: Any, engine: KnownEngine
) -> None:
    sequences = [[(7 * index + step) % WIDTH for step in range(2 + 40 * index)] for index in range(20)]
    request = expert_pb2.ScoreRequest(sequences=[expert_pb2.TokenSequence(token_ids=s) for s in sequences])
    gold: list[list[float]] = [[] for _ in sequences]
    argmax: list[list[int]] = [[] for _ in sequences]
    last_index = 0
    async for answer in expert.Score(request):
        assert answer.sequence_index >= last_index
        last_index = answer.sequence_index
        assert answer.from_position == len(gold[last_index])
        gold[last_index].extend(np.frombuffer(answer.gold_log_probs, "<f4").tolist())
        argmax[last_index].extend(answer.argmax_ids)
        assert not answer.HasField("rows")
    for index, sequence in enumerate(sequences):
        np.testing.assert_allclose(gold[index], expected_log_probs(engine, sequence), rtol=1e-6)
        assert argmax[index] == [successor(token) for token in sequence[:-1]]


async def test_rows_are_scored_in_chunks_that_fit_into_a_message(engine: KnownEngine) -> None:
    engine.facts = type(engine.facts)("wide", "w", "t", 5000, "fake", "float32", 100, 5)
    engine.rows = lambda token_ids: torch.ones(len(token_ids), 5000)  # type: ignore[method-assign]
    request = expert_pb2.ScoreRequest(
        sequences=[expert_pb2.TokenSequence(token_ids=[1] * 10)], output=expert_pb2.SCORE_OUTPUT_ROWS
    )
    async with served_expert(engine, max_message_bytes=65536) as (stub, _, _):
        chunks = [answer.rows.num_rows async for answer in stub.Score(request)]
    assert chunks == [2, 2, 2, 2, 1]


async def score_one(expert: Any, token_ids: list[int]) -> list[float]:
    request = expert_pb2.ScoreRequest(sequences=[expert_pb2.TokenSequence(token_ids=token_ids)])
    return [x async for a in expert.Score(request) for x in np.frombuffer(a.gold_log_probs, "<f4").tolist()]


async def test_scoring_goes_on_when_its_session_is_evicted_between_chunks(
    expert: Any, engine: KnownEngine
) -> None:
    token_ids = [step % WIDTH for step in range(700)]
    engine.is_forgetful = True
    wanted = expected_log_probs(engine, token_ids)
    np.testing.assert_allclose(await score_one(expert, token_ids), wanted, rtol=1e-6)
    served = [(call.from_position, len(call.token_ids)) for call in engine.calls]
    assert served == [(0, 256), (256, 256), (0, 512), (512, 187), (0, 699)]


async def test_scoring_waits_while_there_is_no_room(expert: Any, engine: KnownEngine) -> None:
    engine.errors = [OutOfRoom(Reason.QUEUE_FULL, "full", retry_after_seconds=0.01) for _ in range(3)]
    assert len(await score_one(expert, [1, 2, 3])) == 2
    assert len(engine.calls) == 4


async def test_scoring_that_fails_says_why(expert: Any, engine: KnownEngine) -> None:
    engine.errors = [InternalFault(Reason.NON_FINITE_LOGITS, "NaN")]
    error = await refusal(score_one(expert, [1, 2, 3]))
    assert error.reason is Reason.NON_FINITE_LOGITS


async def test_scoring_forgets_its_sessions(expert: Any, engine: KnownEngine) -> None:
    await score_one(expert, [1, 2, 3])
    assert engine.num_forwards == 1
    assert engine.lengths == {}


async def test_a_client_that_leaves_ends_the_scoring(expert: Any, engine: KnownEngine) -> None:
    engine.gate.clear()
    request = expert_pb2.ScoreRequest(sequences=[expert_pb2.TokenSequence(token_ids=[1, 2])] * 20)
    stream = expert.Score(request)
    reading = asyncio.ensure_future(stream.read())
    await until(lambda: engine.num_waiting == 8)
    stream.cancel()
    await until(lambda: engine.num_waiting == 0)
    await asyncio.gather(reading, return_exceptions=True)


@pytest.mark.parametrize(
    ("sequences", "reason", "field"),
    [
        ([], Reason.INVALID_FIELD, "sequences"),
        ([[1, 2]] * 257, Reason.INVALID_FIELD, "sequences"),
        ([[1, 2], [1]], Reason.INVALID_FIELD, "sequences[1].token_ids"),
        ([[1, 2], [1, WIDTH]], Reason.TOKEN_OUT_OF_RANGE, "sequences[1].token_ids"),
        ([[1] * 1002], Reason.CONTEXT_FULL, "sequences[0].token_ids"),
    ],
)
async def test_sequences_that_cannot_be_scored_are_refused_before_the_first_answer(
    expert: Any, sequences: list[list[int]], reason: Reason, field: str
) -> None:
    request = expert_pb2.ScoreRequest(sequences=[expert_pb2.TokenSequence(token_ids=s) for s in sequences])
    error = await refusal(expert.Score(request).read())
    assert (error.reason, error.metadata["field"]) == (reason, field)


async def test_health_turns_when_the_engine_stands_still_with_work_pending(engine: KnownEngine) -> None:
    async with (
        served_expert(engine, frozen_after_seconds=0.3) as (stub, running, _),
        channel(running.address) as opened,
    ):
        health = health_pb2_grpc.HealthStub(opened)
        statuses: list[int] = []

        async def watch() -> None:
            async for answer in health.Watch(health_pb2.HealthCheckRequest()):
                statuses.append(answer.status)

        watching = asyncio.create_task(watch())
        await asyncio.sleep(0.5)
        engine.gate.clear()
        step = asyncio.create_task(_step(stub))
        await until(lambda: len(statuses) == 2)
        engine.gate.set()
        await step
        await until(lambda: len(statuses) == 3)
        watching.cancel()
    response = health_pb2.HealthCheckResponse
    assert statuses == [response.SERVING, response.NOT_SERVING, response.SERVING]


async def _step(stub: Any) -> None:
    await stub.Step(Step(session_id="s", token_ids=[3]))
