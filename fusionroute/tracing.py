"""Traces by OpenTelemetry (extra `otel`): one trace for each answer, across client, router, experts and Redis.

Off unless an endpoint is given; then a call costs one comparison. While it is on, there is a span for every call that
is no step of a token, one for each turn, and within a turn one for what a person would look for: the first time a
model is asked (its prefill), whatever took longer than SLOW_SECONDS, and what failed. Such spans are made when it is
over, so an undisturbed token makes none.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from opentelemetry.context import Context
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.trace import Span, Tracer

TRACEPARENT_KEY = "traceparent"
ENDPOINT_VARIABLE = "OTEL_EXPORTER_OTLP_ENDPOINT"
SLOW_SECONDS = 0.25
"""A row, a step or a script that takes longer has a span of its own."""
UNTRACED_CALLS = frozenset(
    {"ExpertService/Step", "ExpertService/StepBatch", "ExpertService/StepStream"}
)
"""One for each token: spans of the interesting ones are made by whoever serves them."""
STOP_MILLISECONDS = 2000

Attributes = Mapping[str, str | int | float | bool]

_tracer: Tracer | None = None


class TracingMissing(Exception):
    """An endpoint is given, but the extra `otel` is not installed."""


def configure(service: str, endpoint: str | None = None) -> TracerProvider | None:
    """Sends spans from now on; None where no endpoint is given.

    Args:
        service: `service.name` of the spans.
        endpoint: URL of an OTLP collector's gRPC port; absent = OTEL_EXPORTER_OTLP_ENDPOINT.

    Raises:
        TracingMissing: see there.
    """
    target = endpoint or os.environ.get(ENDPOINT_VARIABLE)
    if not target:
        return None
    try:
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as error:
        raise TracingMissing(
            f"otel_endpoint = {target!r} needs the extra: pip install 'fusionroute[otel]' ({error})"
        ) from None
    provider = TracerProvider(resource=Resource.create({"service.name": service}), shutdown_on_exit=False)
    exporter = OTLPSpanExporter(endpoint=target, insecure=not target.startswith("https://"))
    provider.add_span_processor(BatchSpanProcessor(exporter))
    use(provider)
    return provider


def use(provider: TracerProvider | None) -> None:
    """Makes spans with a provider from now on; None = makes none."""
    global _tracer
    _tracer = None if provider is None else provider.get_tracer("fusionroute")


@contextmanager
def exporting(service: str, endpoint: str | None) -> Iterator[None]:
    """Sends spans within the context and those left at its end. Raises as `configure`."""
    provider = configure(service, endpoint)
    try:
        yield
    finally:
        if provider is not None:
            use(None)
            provider.force_flush(STOP_MILLISECONDS)
            provider.shutdown()


def is_on() -> bool:
    """Whether spans are made."""
    return _tracer is not None


class OpenSpan:
    """A span that is current for the rest of its task: begun where a task begins that ends with it."""

    __slots__ = ("span",)

    def __init__(self, span: Span) -> None:
        from opentelemetry import context, trace

        self.span = span
        context.attach(trace.set_span_in_context(span))

    def end(self, attributes: Attributes | None = None, error: str = "") -> None:
        """Ends it, as failed where an error is named."""
        from opentelemetry import trace

        for name, value in (attributes or {}).items():
            self.span.set_attribute(name, value)
        if error:
            self.span.set_status(trace.StatusCode.ERROR, error)
        self.span.end()


def begin_call(rpc: str, traceparent: str) -> OpenSpan | None:
    """A server's span for a call; None while tracing is off, and for calls that make spans themselves.

    Such a call still becomes part of the caller's trace.
    """
    if _tracer is None:
        return None
    if rpc in UNTRACED_CALLS:
        if traceparent:
            from opentelemetry import context

            context.attach(_context_of(traceparent))  # the task ends with the call
        return None
    from opentelemetry.trace import SpanKind

    span = _tracer.start_span(rpc, context=_context_of(traceparent), kind=SpanKind.SERVER)
    return OpenSpan(span)


def end_call(span: OpenSpan | None, code: str) -> None:
    """Ends a server's span with the status that the caller got."""
    if span is not None:
        span.end({"rpc.grpc.status": code}, "" if code in ("OK", "CANCELLED") else code)


def begin(name: str, attributes: Attributes | None = None) -> OpenSpan | None:
    """A span around what follows in this task; None while tracing is off."""
    if _tracer is None:
        return None
    return OpenSpan(_tracer.start_span(name, attributes=attributes))


def note(name: str, seconds: float, attributes: Attributes | None = None, error: str = "") -> None:
    """A span for something that has just ended; makes none outside of a trace.

    Args:
        seconds: how long it took.
        error: empty where it succeeded.
    """
    if _tracer is None or not traceparent():
        return
    from opentelemetry import trace

    end = time.time_ns()
    span = _tracer.start_span(name, attributes=attributes, start_time=end - int(seconds * 1e9))
    if error:
        span.set_status(trace.StatusCode.ERROR, error)
    span.end(end)


def traceparent() -> str:
    """W3C trace context of the current span, ours or the application's; empty without one that is recorded."""
    if _tracer is None and "opentelemetry.trace" not in sys.modules:
        return ""
    from opentelemetry import trace

    context = trace.get_current_span().get_span_context()
    if not context.is_valid or not context.trace_flags.sampled:
        return ""
    return f"00-{context.trace_id:032x}-{context.span_id:016x}-{context.trace_flags:02x}"


def trace_id() -> str:
    """Of the current span, for log lines; empty as `traceparent`."""
    return traceparent()[3:35]


def _context_of(traceparent: str) -> Context:
    from opentelemetry.context import Context
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    # A call without a trace begins one; what is current here belongs to another call.
    return TraceContextTextMapPropagator().extract({TRACEPARENT_KEY: traceparent}, context=Context())
