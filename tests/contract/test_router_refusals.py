"""RouterService over real gRPC: every kind of bad request, and what may serve and be asked."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
import pytest_asyncio

from fusionroute.errors import FusionRouteError, Reason
from fusionroute.grpc_runtime import channel, error_from_rpc
from fusionroute.manifest import written_fingerprint
from fusionroute.router_model import load_checkpoint
from fusionroute.v1 import common_pb2, registry_pb2, registry_pb2_grpc
from fusionroute.v1.router_pb2 import GenerateRequest
from tests.router_requests import ask, reason_of
from tests.served_stack import SLOTS, Family, Stack, make_family, served
from tests.tiny_models import MAX_CONTEXT, WIDTH

pytestmark = pytest.mark.asyncio(loop_scope="module")

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


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def stack(family: Family) -> AsyncIterator[Stack]:
    """One for all: these tests leave nothing behind that another would see."""
    async with served(family, early_asks="off") as running:
        yield running


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
    assert set(info.available_combine) == {1, 2, 3, 4, 5, 6, 7} and not info.HasField("base")
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
