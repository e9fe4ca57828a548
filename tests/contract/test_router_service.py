"""RouterService over real gRPC: turns, resuming, cancelling, sessions, and every kind of bad request."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

import grpc
import pytest

from fusionroute.errors import FusionRouteError, Reason
from fusionroute.fusion import Sampling
from fusionroute.grpc_runtime import channel, error_from_rpc
from fusionroute.manifest import written_fingerprint
from fusionroute.router_model import load_checkpoint
from fusionroute.v1 import common_pb2, registry_pb2, registry_pb2_grpc, router_pb2
from fusionroute.v1.router_pb2 import GenerateRequest, SamplingParameters
from tests.served_stack import SLOTS, Family, Stack, make_family, served
from tests.tiny_models import MAX_CONTEXT, WIDTH

PROMPT = [5, 9, 11, 3]


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Family:
    return make_family(tmp_path_factory.mktemp("family"))


@pytest.fixture
async def stack(family: Family) -> AsyncIterator[Stack]:
    async with served(family, early_asks="off") as running:
        yield running


def ask(max_tokens: int = 8, prompt: list[int] | None = None, **changes: Any) -> GenerateRequest:
    sampling = {"max_tokens": max_tokens, "ignore_eos": True} | changes.pop("sampling", {})
    tokens = {"ids": prompt or PROMPT}
    return GenerateRequest(token_ids=tokens, sampling=SamplingParameters(**sampling), **changes)


async def reason_of(stack: Stack, request: GenerateRequest) -> tuple[Reason, str]:
    with pytest.raises(FusionRouteError) as caught:
        await stack.answer(request)
    return caught.value.reason, caught.value.message


async def first_token(stack: Stack, request: GenerateRequest) -> str:
    """Starts a turn, reads one token and leaves. Returns the session id."""
    session_id = ""
    async with aclosing(stack.client.generate(request)) as events:
        async for event in events:
            if event.WhichOneof("event") == "started":
                session_id = event.started.session_id
            if event.WhichOneof("event") == "token":
                break
    return session_id


async def test_a_turn_streams_started_tokens_finished_with_usage_and_costs(stack: Stack) -> None:
    answer = await stack.answer(ask(8, return_routing_weights=True, num_top_candidates=3))
    assert answer.started.num_prompt_tokens == len(PROMPT)
    assert answer.started.combine == router_pb2.COMBINE_RULE_SUM
    assert [token.index for token in answer.tokens] == list(range(8))
    for token in answer.tokens:
        assert token.expert in SLOTS
        serving = stack.router.directory.best(token.expert)
        assert serving is not None
        assert token.expert_epoch == serving.entry.epoch > serving.entry.model.epoch
        assert len(token.routing_weights) == 3
        assert sum(token.routing_weights) == pytest.approx(1.0)
        assert token.routing_weights[SLOTS.index(token.expert)] == max(token.routing_weights)
        assert token.top.fused[0].id == token.id
        assert token.top.fused[0].logprob == pytest.approx(token.logprob, abs=1e-5)
        assert len(token.top.expert) == len(token.top.router) == 3
    assert answer.finished is not None
    assert answer.finished.reason == router_pb2.FINISH_REASON_LENGTH
    assert (answer.finished.num_prompt_tokens, answer.finished.num_generated_tokens) == (4, 8)
    costs = answer.finished.statistics
    assert (costs.num_router_forwards, costs.num_expert_calls, costs.num_replays) == (8, 8, 0)
    parts = costs.router_seconds + costs.expert_seconds + costs.fuse_seconds + costs.store_seconds
    assert 0 < costs.first_token_seconds <= costs.total_seconds
    assert 0 < parts <= costs.total_seconds
    assert 0 < costs.expert_forward_seconds <= costs.expert_seconds


async def test_details_that_nobody_asked_for_are_not_sent(stack: Stack) -> None:
    answer = await stack.answer(ask(2))
    assert not answer.tokens[0].routing_weights
    assert not answer.tokens[0].HasField("top")


async def test_the_served_route_is_the_models_route(stack: Stack, family: Family) -> None:
    """The expert of every token is the one with the largest weight, and no other was asked for it."""
    answer = await stack.answer(ask(20))
    reference = family.reference()
    wanted = reference.write(PROMPT, "sum", Sampling(logit_bias={1: 0.0}), 20)
    names = [SLOTS[token.expert] for token in wanted if token.expert is not None]
    assert [token.expert for token in answer.tokens][: len(names)] == names


async def test_rules_that_need_no_expert_or_no_router_call_none(stack: Stack) -> None:
    alone = await stack.answer(ask(5, combine=router_pb2.COMBINE_RULE_ROUTER))
    assert alone.finished is not None
    assert alone.finished.statistics.num_expert_calls == 0
    assert {token.expert for token in alone.tokens} == {""}
    fixed = await stack.answer(ask(5, combine=router_pb2.COMBINE_RULE_ROUTE, fixed_expert="strings"))
    assert fixed.finished is not None
    assert fixed.finished.statistics.num_router_forwards == 0
    assert {token.expert for token in fixed.tokens} == {"strings"}
    by_experts = []
    for start in range(6):
        select = await stack.answer(
            ask(10, prompt=[10 + 7 * start, 3], combine=router_pb2.COMBINE_RULE_SELECT)
        )
        assert select.finished is not None
        by_experts.append(sum(token.expert != "" for token in select.tokens))
        assert select.finished.statistics.num_expert_calls == by_experts[-1]
    assert 0 < sum(by_experts) < 60


async def test_a_drawn_seed_is_told_and_repeats_the_answer(stack: Stack) -> None:
    first = await stack.answer(ask(12, sampling={"temperature": 1.5}))
    again = await stack.answer(ask(12, sampling={"temperature": 1.5, "seed": first.started.seed}))
    other = await stack.answer(ask(12, sampling={"temperature": 1.5, "seed": first.started.seed ^ 1}))
    assert first.ids == again.ids != other.ids


async def test_a_client_that_left_resumes_at_any_token(stack: Stack) -> None:
    whole = await stack.answer(ask(30))
    session_id = await first_token(stack, ask(30))
    resumed = await stack.resume(session_id, 3)
    assert resumed.ids == whole.ids[3:]
    assert [token.index for token in resumed.tokens] == list(range(3, 30))
    later = await stack.resume(session_id)
    assert [(t.id, t.text, t.expert, t.expert_epoch) for t in later.tokens] == [
        (t.id, t.text, t.expert, t.expert_epoch) for t in whole.tokens
    ]
    assert later.text == whole.text
    with pytest.raises(FusionRouteError) as caught:
        await stack.resume(session_id, 31)
    assert caught.value.reason is Reason.INVALID_FIELD


async def test_several_streams_follow_one_turn(stack: Stack) -> None:
    session_id = await first_token(stack, ask(40))
    answers = await asyncio.gather(*(stack.resume(session_id) for _ in range(4)))
    assert len({tuple(answer.ids) for answer in answers}) == 1
    assert len(answers[0].ids) == 40


async def test_a_turn_put_aside_by_a_stopped_router_is_continued_by_the_next(
    family: Family, redis_url: str
) -> None:
    async with served(family, redis_url=redis_url) as stack:
        whole = await stack.answer(ask(60, sampling={"temperature": 1.0, "seed": 5}))
        session_id = await first_token(stack, ask(60, sampling={"temperature": 1.0, "seed": 5}))
        await stack.router.keeper.drain(0.0)
    async with served(family, redis_url=redis_url) as stack:
        stored = await stack.client.get_session(session_id)
        assert stored.state == router_pb2.SESSION_STATE_RUNNING
        assert len(PROMPT) < len(stored.token_ids) < 64
        for resumed in await asyncio.gather(*(stack.resume(session_id, 0) for _ in range(8))):
            assert resumed.ids == whole.ids
            assert resumed.text == whole.text


async def test_a_turn_that_nobody_follows_is_put_aside(family: Family) -> None:
    async with served(family, alone_seconds=0.01) as stack:
        whole = await stack.answer(ask(80))
        session_id = await first_token(stack, ask(80))
        async with asyncio.timeout(10):
            while stack.router.keeper.num_running:
                await asyncio.sleep(0.01)
        stored = await stack.client.get_session(session_id)
        assert stored.state == router_pb2.SESSION_STATE_RUNNING
        assert (await stack.resume(session_id)).ids == whole.ids


async def test_cancel_ends_a_turn_and_keeps_what_was_written(stack: Stack) -> None:
    session_id = await first_token(stack, ask(90))
    assert await stack.client.cancel(session_id)
    answer = await stack.resume(session_id)
    assert answer.finished is not None
    assert answer.finished.reason == router_pb2.FINISH_REASON_CANCELLED
    stored = await stack.client.get_session(session_id)
    assert stored.state == router_pb2.SESSION_STATE_FINISHED
    assert list(stored.token_ids) == PROMPT + answer.ids
    assert not await stack.client.cancel(session_id)


async def test_cancel_interrupts_waiting_for_an_expert_that_is_gone(stack: Stack) -> None:
    for slot in SLOTS:
        await stack.stop_expert(slot)
    request = ask(5, session_id="waits")
    task = asyncio.create_task(stack.answer(request))
    async with asyncio.timeout(10):
        while not stack.router.keeper.num_running:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.2)
        assert await stack.client.cancel("waits")
        answer = await task
    assert answer.finished is not None
    assert (answer.finished.reason, answer.ids) == (router_pb2.FINISH_REASON_CANCELLED, [])


async def test_a_second_turn_computes_only_what_is_new(stack: Stack) -> None:
    first = await stack.answer(
        ask(10, session_id="talk", combine=router_pb2.COMBINE_RULE_SUM, fixed_expert="math")
    )
    engines = {"router": stack.router.engine, "math": stack.engines["math"]}
    cached = {name: await cached_length(engine, "talk") for name, engine in engines.items()}
    assert cached == {"router": 13, "math": 13}
    second = await stack.answer(
        ask(10, session_id="talk", prompt=[7, 8], combine=router_pb2.COMBINE_RULE_SUM, fixed_expert="math")
    )
    assert second.started.num_prompt_tokens == 4 + 10 + 2
    assert second.finished is not None
    assert second.finished.statistics.num_replays == 0
    whole = await stack.answer(ask(10, prompt=PROMPT + first.ids + [7, 8], fixed_expert="math"))
    assert second.ids == whole.ids
    stored = await stack.client.get_session("talk")
    assert list(stored.token_ids) == PROMPT + first.ids + [7, 8] + second.ids
    assert stored.answer_position == 16
    assert stored.answer_text == second.text


async def cached_length(engine: Any, session_id: str) -> int:
    views, _ = await engine.list_sessions(1000)
    return next(view.cached_length for view in views if view.session_id == session_id)


async def test_the_same_request_id_begins_one_turn_only(stack: Stack) -> None:
    first = await stack.answer(ask(6, session_id="once", request_id="r1"))
    again = await stack.answer(ask(6, session_id="once", request_id="r1"))
    assert again.ids == first.ids
    stored = await stack.client.get_session("once")
    assert len(stored.token_ids) == len(PROMPT) + 6
    other = await stack.answer(ask(6, session_id="once", request_id="r2"))
    assert other.started.num_prompt_tokens == len(PROMPT) + 6 + len(PROMPT)


async def test_a_session_takes_one_turn_at_a_time(stack: Stack) -> None:
    await first_token(stack, ask(90, session_id="busy"))
    reason, message = await reason_of(stack, ask(5, session_id="busy"))
    assert reason is Reason.SESSION_BUSY
    assert "busy" in message


async def test_delete_forgets_a_session_everywhere(stack: Stack) -> None:
    answer = await stack.answer(ask(6))
    session_id = answer.started.session_id
    assert await stack.client.delete_session(session_id)
    assert not await stack.client.delete_session(session_id)
    for engine in (stack.router.engine, *stack.engines.values()):
        views, _ = await engine.list_sessions(1000)
        assert session_id not in {view.session_id for view in views}
    with pytest.raises(FusionRouteError) as caught:
        await stack.client.get_session(session_id)
    assert caught.value.reason is Reason.SESSION_UNKNOWN


async def test_stop_strings_end_the_answer_before_them(stack: Stack) -> None:
    whole = await stack.answer(ask(20))
    words = whole.text.split(" ")
    stop = f"{words[5]} {words[6]}"
    answer = await stack.answer(ask(20, sampling={"stop": [stop, "never"]}))
    assert answer.finished is not None
    assert answer.finished.reason == router_pb2.FINISH_REASON_STOP
    assert answer.finished.stop == stop
    assert answer.text == whole.text[: whole.text.index(stop)]
    assert answer.ids == whole.ids[: len(answer.ids)]
    resumed = await stack.resume(answer.started.session_id)
    assert (resumed.text, resumed.finished.stop if resumed.finished else "") == (answer.text, stop)


async def test_the_end_token_ends_an_answer_unless_ignored(stack: Stack) -> None:
    bias = {"logit_bias": {1: 100.0}}
    ended = await stack.answer(ask(5, sampling=bias | {"ignore_eos": False}))
    assert ended.ids == [1]
    assert ended.finished is not None
    assert ended.finished.reason == router_pb2.FINISH_REASON_EOS
    assert ended.text == ""
    assert (await stack.answer(ask(5, sampling=bias))).ids == [1] * 5


async def test_a_full_context_ends_the_answer(stack: Stack) -> None:
    answer = await stack.answer(ask(500))
    assert answer.finished is not None
    assert answer.finished.reason == router_pb2.FINISH_REASON_CONTEXT
    assert len(PROMPT) + len(answer.ids) == MAX_CONTEXT


async def test_text_prompts_are_encoded_by_the_checkpoints_tokenizer(stack: Stack) -> None:
    text = GenerateRequest(text="w5 w9 w11 w3", sampling={"max_tokens": 5, "ignore_eos": True})
    assert (await stack.answer(text)).ids == (await stack.answer(ask(5))).ids


BAD: list[tuple[dict[str, Any], Reason, str]] = [
    ({"sampling": {"temperature": -1.0}}, Reason.INVALID_FIELD, "temperature"),
    ({"sampling": {"temperature": float("nan")}}, Reason.INVALID_FIELD, "temperature"),
    ({"sampling": {"top_p": 0.0}}, Reason.INVALID_FIELD, "top_p"),
    ({"sampling": {"top_p": 1.5}}, Reason.INVALID_FIELD, "top_p"),
    ({"sampling": {"min_p": -0.1}}, Reason.INVALID_FIELD, "min_p"),
    ({"sampling": {"repetition_penalty": 0.0}}, Reason.INVALID_FIELD, "repetition_penalty"),
    ({"sampling": {"presence_penalty": 3.0}}, Reason.INVALID_FIELD, "presence_penalty"),
    ({"sampling": {"frequency_penalty": -3.0}}, Reason.INVALID_FIELD, "frequency_penalty"),
    ({"sampling": {"logit_bias": {WIDTH: 1.0}}}, Reason.INVALID_FIELD, "logit_bias"),
    ({"sampling": {"logit_bias": {3: 1e9}}}, Reason.INVALID_FIELD, "logit_bias[3]"),
    ({"sampling": {"stop": [""]}}, Reason.INVALID_FIELD, "stop"),
    ({"sampling": {"stop": ["x"] * 17}}, Reason.INVALID_FIELD, "stop"),
    ({"max_tokens": 0}, Reason.INVALID_FIELD, "max_tokens"),
    ({"num_top_candidates": 21}, Reason.INVALID_FIELD, "num_top_candidates"),
    ({"combine": 99}, Reason.INVALID_FIELD, "combine"),
    ({"fixed_expert": "poetry"}, Reason.UNKNOWN_SLOT, "poetry"),
    ({"session_id": "no spaces"}, Reason.INVALID_FIELD, "session_id"),
    ({"prompt": [WIDTH]}, Reason.TOKEN_OUT_OF_RANGE, str(WIDTH)),
    ({"prompt": [4] * MAX_CONTEXT}, Reason.CONTEXT_FULL, str(MAX_CONTEXT - 1)),
]


async def test_bad_requests_are_refused_by_name_and_write_nothing(stack: Stack) -> None:
    for changes, reason, named in BAD:
        got, message = await reason_of(stack, ask(**({"session_id": "bad"} | changes)))
        assert (got, named in message) == (reason, True), (changes, got, message)
    for empty in (GenerateRequest(), GenerateRequest(text=""), GenerateRequest(token_ids={"ids": []})):
        assert (await reason_of(stack, empty))[0] is Reason.EMPTY_PROMPT
    chat = GenerateRequest(messages={"messages": [{"role": "user", "content": "hello"}]})
    got, message = await reason_of(stack, chat)
    assert got is Reason.INVALID_FIELD
    assert "chat template" in message
    with pytest.raises(FusionRouteError) as caught:
        await stack.client.get_session("bad")
    assert caught.value.reason is Reason.SESSION_UNKNOWN
    assert stack.router.keeper.num_running == 0


async def test_a_huge_prompt_is_refused_and_the_service_goes_on(stack: Stack) -> None:
    got, message = await reason_of(stack, GenerateRequest(text="w5 " * 200_000))
    assert got is Reason.CONTEXT_FULL
    assert "600000 characters" in message
    assert len((await stack.answer(ask(3))).ids) == 3


async def test_resuming_or_cancelling_an_unknown_session_says_so(stack: Stack) -> None:
    for call in (stack.resume("unknown"), stack.client.cancel("unknown")):
        with pytest.raises(FusionRouteError) as caught:
            await call
        assert caught.value.reason is Reason.SESSION_UNKNOWN
        assert "unknown" in caught.value.message


async def test_an_expert_that_stays_away_is_named_after_the_timeout(family: Family) -> None:
    async with served(family, start=False, expert_timeout_seconds=0.5) as stack:
        reason, message = await reason_of(stack, ask(5, fixed_expert="math"))
        assert reason is Reason.EXPERT_UNAVAILABLE
        assert "math" in message
        info = await stack.client.info()
        assert [slot.ready for slot in info.slots] == [False] * 3


async def test_info_names_checkpoint_rules_and_slots(stack: Stack, family: Family) -> None:
    info = await stack.client.info()
    assert [slot.slot for slot in info.slots] == list(SLOTS)
    assert all(slot.ready and slot.address for slot in info.slots)
    assert set(info.available_combine) == {1, 2, 3, 4, 5, 6}
    assert info.model.logits_width == WIDTH
    assert (await stack.answer(ask(1))).started.checkpoint == info.checkpoint
    assert load_checkpoint(family.router).fingerprint(info.model.weights_fingerprint) == info.checkpoint
    assert written_fingerprint(family.router) == info.checkpoint


async def test_a_checkpoint_without_gates_refuses_gated_rules(tmp_path: Any) -> None:
    async with served(make_family(tmp_path, ("math",), gates=False)) as stack:
        for rule in (2, 3, 4):
            reason, message = await reason_of(stack, ask(2, combine=rule))
            assert reason is Reason.RULE_NOT_AVAILABLE
            assert "sum, route, router" in message
        assert len((await stack.answer(ask(2))).ids) == 2


async def test_the_router_admits_only_experts_of_its_vocabulary(stack: Stack) -> None:
    async def refusal(slot: str, **changes: Any) -> FusionRouteError:
        model = common_pb2.ModelIdentity()
        model.CopyFrom(stack.router.directory.best("math").entry.model)  # type: ignore[union-attr]
        model.MergeFrom(common_pb2.ModelIdentity(**changes))
        request = registry_pb2.RegisterExpertRequest(
            instance_id="x", slot=slot, address="127.0.0.1:1", model=model
        )
        async with channel(stack.router.server.address) as connection:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await registry_pb2_grpc.RegistryServiceStub(connection).RegisterExpert(request, timeout=5)
        return error_from_rpc(caught.value)

    error = await refusal("math", tokenizer_fingerprint="other")
    assert error.reason is Reason.VOCABULARY_MISMATCH
    assert "other" in error.message
    assert stack.router.engine.facts.tokenizer_fingerprint in error.message
    error = await refusal("math", logits_width=WIDTH + 3)
    assert error.reason is Reason.VOCABULARY_MISMATCH
    assert str(WIDTH + 3) in error.message and str(WIDTH) in error.message
    error = await refusal("poetry")
    assert error.reason is Reason.UNKNOWN_SLOT
    assert "math, strings, format" in error.message
    assert len(await stack.client.list_experts()) == 3
