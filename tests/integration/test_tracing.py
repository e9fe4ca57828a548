"""One answer is one trace: from the caller's span through the router to experts and Redis."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import StatusCode

from fusionroute import tracing
from fusionroute.engine import StepCall
from fusionroute.errors import FusionRouteError, Reason, Unavailable
from fusionroute.grpc_runtime import channel
from fusionroute.v1.router_pb2 import GenerateRequest
from fusionroute.v1.router_pb2_grpc import RouterServiceStub
from router_service.asking import Answer, Cache, Patience, ask
from router_service.session_text import Text
from tests.expert_fakes import until
from tests.served_stack import make_family, served

SLOTS = ("math", "strings")
TRACE_ID, CALLER = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


@pytest.fixture
def exporter() -> Iterator[InMemorySpanExporter]:
    provider = TracerProvider(shutdown_on_exit=False)
    found = InMemorySpanExporter()
    provider.add_span_processor(SimpleSpanProcessor(found))
    tracing.use(provider)
    yield found
    tracing.use(None)
    provider.shutdown()


def request(**changes: object) -> GenerateRequest:
    return GenerateRequest(
        token_ids={"ids": [2, 5, 9, 11]}, sampling={"max_tokens": 20, "ignore_eos": True}, **changes
    )


def parent_of(span: ReadableSpan) -> int:
    """The id of the span that it belongs under."""
    assert span.parent is not None
    return span.parent.span_id


def fact(span: ReadableSpan, name: str) -> object:
    """One attribute."""
    assert span.attributes is not None
    return span.attributes[name]


async def test_one_answer_is_one_trace_across_router_experts_and_redis(
    tmp_path: Path, exporter: InMemorySpanExporter
) -> None:
    async with (
        served(make_family(tmp_path, SLOTS)) as stack,
        channel(stack.router.server.address) as to_router,
    ):
        exporter.clear()
        metadata = ((tracing.TRACEPARENT_KEY, f"00-{TRACE_ID}-{CALLER}-01"),)
        events = [
            e async for e in RouterServiceStub(to_router).Generate(request(), timeout=60, metadata=metadata)
        ]
        await until(lambda: "turn" in {span.name for span in exporter.get_finished_spans()}, 20)
        spans = [s for s in exporter.get_finished_spans() if f"{s.context.trace_id:032x}" == TRACE_ID]
    by_name: dict[str, list[ReadableSpan]] = {}
    for span in spans:
        by_name.setdefault(span.name, []).append(span)
    (call,), (turn,) = by_name["RouterService/Generate"], by_name["turn"]
    assert f"{parent_of(call):016x}" == CALLER
    assert parent_of(turn) == call.context.span_id
    assert fact(turn, "num_tokens") == 20
    asked = {event.event.token.expert for event in events if event.event.HasField("token")} - {""}
    assert {fact(span, "slot") for span in by_name["prefill"]} == asked, "each expert's prefill, once"
    assert len(by_name["prefill"]) >= len(asked)
    assert len(by_name["row of expert"]) >= len(asked)
    for name in ("prefill", "row of expert", "row of router", "redis finish"):
        assert all(parent_of(span) == turn.context.span_id for span in by_name[name]), name
    assert "redis begin_turn" in by_name
    assert len(spans) < 20 + 20, "no span for each token"


class SometimesAway:
    """A model and its only cache, away at the first attempt."""

    name, slot = "math-1@7", "math"

    def __init__(self) -> None:
        self.num_attempts = 0

    async def locate(self, text: Text, deadline: float) -> SometimesAway:
        return self

    def report(self, cache: Cache, error: FusionRouteError, began: float) -> None:
        pass

    def seconds_until_retry(self) -> float:
        return 0.0

    async def step(self, call: StepCall, deadline: float, top_logits: int = 0) -> Answer:
        self.num_attempts += 1
        if self.num_attempts == 1:
            raise Unavailable(Reason.EXPERT_UNAVAILABLE, "away")
        return Answer(np.zeros((1, 4), np.float32), None, 7, self.name, 0.001)


async def test_a_failed_attempt_has_a_span_with_its_reason(exporter: InMemorySpanExporter) -> None:
    turn = tracing.begin("turn")
    assert turn is not None
    await ask(SometimesAway(), Text("one", 1, [1, 2, 3]), Patience(20.0))
    turn.end()
    (attempt,) = (span for span in exporter.get_finished_spans() if span.name == "attempt")
    assert attempt.status.status_code is StatusCode.ERROR
    assert attempt.status.description == "EXPERT_UNAVAILABLE"
    assert fact(attempt, "slot") == "math"
    assert parent_of(attempt) == turn.span.get_span_context().span_id


async def test_nothing_is_traced_unless_it_is_switched_on(tmp_path: Path) -> None:
    assert tracing.configure("test") is None
    assert not tracing.is_on()
    assert tracing.begin("turn") is None
    tracing.note("row", 1.0)  # costs nothing, does nothing
    assert tracing.trace_id() == ""
