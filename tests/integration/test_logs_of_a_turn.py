"""What a run's log says of a turn, and that one word finds it in router and expert."""

from __future__ import annotations

from pathlib import Path

import structlog
from structlog.testing import capture_logs

from fusionroute.grpc_runtime import channel
from fusionroute.rpc_context import REQUEST_ID_KEY, bind_request, outgoing_metadata
from fusionroute.v1.router_pb2 import GenerateRequest
from fusionroute.v1.router_pb2_grpc import RouterServiceStub
from router_service import metrics
from tests.served_stack import make_family, served

NUM_TOKENS = 12


async def test_every_line_of_a_turn_names_session_and_request_and_what_happened_is_counted(
    tmp_path: Path,
) -> None:
    tokens_before = _total("fusionroute_router_tokens")
    turns_before = _total("fusionroute_router_turns")
    async with served(make_family(tmp_path, ("math", "strings"))) as stack:
        with capture_logs(processors=[structlog.contextvars.merge_contextvars]) as lines:
            answer = await stack.answer(
                GenerateRequest(
                    request_id="the-request",
                    session_id="the-session",
                    token_ids={"ids": [2, 5, 9]},
                    sampling={"max_tokens": NUM_TOKENS, "ignore_eos": True},
                )
            )
    of_turn = [line for line in lines if line["event"].startswith("turn_")]
    assert [line["event"] for line in of_turn] == ["turn_begun", "turn_finished"]
    for line in of_turn:
        assert (line["session"], line["request"]) == ("the-session", "the-request")
    finished = of_turn[1]
    assert finished["fence"] > 0 and finished["reason"] == "length"
    assert sum(finished["tokens_by_slot"].values()) == finished["num_tokens"] == NUM_TOKENS == len(answer.ids)
    assert len([line for line in lines if line["log_level"] != "debug"]) < NUM_TOKENS, (
        "no line for each token"
    )
    assert _total("fusionroute_router_tokens") - tokens_before == NUM_TOKENS
    assert _total("fusionroute_router_turns") - turns_before == 1


async def test_a_refused_request_is_counted_by_its_reason(tmp_path: Path) -> None:
    def refused() -> float:
        return (
            metrics.REGISTRY.get_sample_value(
                "fusionroute_router_rejections_total", {"reason": "INVALID_FIELD"}
            )
            or 0.0
        )

    before = refused()
    async with (
        served(make_family(tmp_path, ("math",)), start=False) as stack,
        channel(stack.router.server.address) as to_router,
    ):
        call = RouterServiceStub(to_router).Generate(
            GenerateRequest(token_ids={"ids": [2]}, sampling={"top_p": 7.0}), timeout=60
        )
        assert (await call.code()).name == "INVALID_ARGUMENT"
    assert refused() == before + 1


async def test_a_request_id_is_passed_on_unless_it_is_no_word() -> None:
    bind_request("abc-1")
    assert outgoing_metadata() == ((REQUEST_ID_KEY, "abc-1"),)
    bind_request("zwei Wörter\n")
    assert outgoing_metadata() is None


def _total(name: str) -> float:
    return sum(
        sample.value
        for metric in metrics.REGISTRY.collect()
        if metric.name == name
        for sample in metric.samples
        if sample.name == f"{name}_total"
    )
