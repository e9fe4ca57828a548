"""What a server gives every call it takes: a request id in its log lines, a measurement, a span.

The request id comes from the caller's metadata (`x-request-id`) or is drawn here; `outgoing_metadata` passes it on,
so that the lines of router and experts about one answer are found by one word.
"""

from __future__ import annotations

import re
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterable
from contextlib import aclosing
from contextvars import Context, ContextVar, copy_context
from functools import lru_cache
from typing import Any, TypeVar
from uuid import uuid4

import grpc
import structlog

from fusionroute import tracing
from fusionroute.metrics import RPC_SECONDS, NotingHistogram
from fusionroute.telemetry import is_debugging

REQUEST_ID_KEY = "x-request-id"

Metadata = tuple[tuple[str, str], ...]
T = TypeVar("T")

log = structlog.get_logger(__name__)

_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
_current_request: ContextVar[str] = ContextVar("fusionroute_request", default="")
_CODE_NAMES: dict[Any, str] = {code.value[0]: code.name for code in grpc.StatusCode} | {
    code: code.name for code in grpc.StatusCode
}


def bind_request(request_id: str) -> None:
    """From now on log lines and outgoing calls of this task carry this request id."""
    _current_request.set(request_id if _REQUEST_ID.fullmatch(request_id) else "")
    structlog.contextvars.bind_contextvars(request=request_id)


def outgoing_metadata(traceparent: str = "") -> Metadata | None:
    """Metadata for a call made on behalf of the one that this task serves; None where there is nothing to tell.

    Args:
        traceparent: W3C trace context to pass on, empty where the call is not traced.
    """
    request_id = _current_request.get()
    pairs: Metadata = ((REQUEST_ID_KEY, request_id),) if request_id else ()
    if traceparent:
        pairs += ((tracing.TRACEPARENT_KEY, traceparent),)
    return pairs or None


def current_request() -> str:
    """The request id that this task serves; empty without one."""
    return _current_request.get()


def new_request_id() -> str:
    """A request id nobody else has."""
    return uuid4().hex[:16]


class ContextInterceptor(grpc.aio.ServerInterceptor):
    """Binds the request id and measures; must stand before the interceptor that turns errors into statuses."""

    async def intercept_service(self, continuation: Any, handler_call_details: Any) -> Any:
        handler = await continuation(handler_call_details)
        method: str = handler_call_details.method
        if handler is None or not method.startswith("/fusionroute."):
            return handler
        if handler.unary_unary is not None:
            return grpc.unary_unary_rpc_method_handler(
                _around_unary(handler.unary_unary, _short_name(method)),
                request_deserializer=handler.request_deserializer,
                response_serializer=handler.response_serializer,
            )
        if handler.unary_stream is not None:
            return grpc.unary_stream_rpc_method_handler(
                _around_stream(handler.unary_stream, _short_name(method)),
                request_deserializer=handler.request_deserializer,
                response_serializer=handler.response_serializer,
            )
        if handler.stream_stream is not None:
            return grpc.stream_stream_rpc_method_handler(
                _around_stream(handler.stream_stream, _short_name(method)),
                request_deserializer=handler.request_deserializer,
                response_serializer=handler.response_serializer,
            )
        return handler


@lru_cache(maxsize=1024)
def _seconds_of(rpc: str, code: str) -> NotingHistogram:
    return RPC_SECONDS.labels(rpc, code)


def _short_name(method: str) -> str:
    """/fusionroute.v1.ExpertService/Step -> ExpertService/Step"""
    return method.rpartition(".")[2]


def _around_unary(behaviour: Callable[[Any, Any], Awaitable[Any]], rpc: str) -> Callable[[Any, Any], Any]:
    async def measured(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
        call = _Call(rpc, context)
        try:
            response = await behaviour(request, context)
        except BaseException as error:
            call.end(_code_of(error, context))
            raise
        call.end("OK")
        return response

    return measured


def _around_stream(
    behaviour: Callable[[Any, Any], AsyncGenerator[Any, None]], rpc: str
) -> Callable[[Any, Any], AsyncIterator[Any]]:
    async def measured(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> AsyncIterator[Any]:
        call = _Call(rpc, context)
        code = "CANCELLED"  # closed from outside, unless one of the following happens
        try:
            async with aclosing(behaviour(request, context)) as responses:
                async for response in responses:
                    yield response
            code = "OK"
        except BaseException as error:
            code = _code_of(error, context)
            raise
        finally:
            call.end(code)

    return measured


class StreamedCall:
    """One of the calls that come together on a stream: measured, logged and traced as if it had come alone.

    Args:
        rpc: service and method, for example "ExpertService/Step".
        request_id: on whose behalf; empty where nobody said.
        traceparent: W3C trace context of the caller; empty = none.
    """

    __slots__ = ("_context", "_request_id", "_rpc", "_started", "_traceparent")

    def __init__(self, rpc: str, request_id: str, traceparent: str) -> None:
        self._rpc, self._request_id, self._traceparent = rpc, request_id, traceparent
        self._started = time.monotonic()
        self._context: Context | None = None

    def run(self, action: Callable[[], T]) -> T:
        """Does something on this call's behalf; log lines and spans made by it say so."""
        if not (tracing.is_on() or is_debugging()):
            return action()
        return self.context().run(action)

    def context(self) -> Context:
        """Where log lines and spans are this call's."""
        if self._context is None:
            self._context = copy_context()
            self._context.run(self._enter)
        return self._context

    def _enter(self) -> None:
        bind_request(self._request_id if _REQUEST_ID.fullmatch(self._request_id) else new_request_id())
        tracing.begin_call(self._rpc, self._traceparent)

    def end(self, code: str) -> None:
        """It was answered with a status code, by name."""
        seconds = time.monotonic() - self._started
        _seconds_of(self._rpc, code).observe(seconds)
        if is_debugging():
            self.run(lambda: log.debug("rpc", rpc=self._rpc, code=code, seconds=round(seconds, 5)))


class _Call:
    """One call being served."""

    __slots__ = ("_rpc", "_span", "_started")

    def __init__(self, rpc: str, context: grpc.aio.ServicerContext[Any, Any]) -> None:
        metadata = context.invocation_metadata() or ()
        given = _value_of(metadata, REQUEST_ID_KEY)
        bind_request(given if _REQUEST_ID.fullmatch(given) else new_request_id())
        self._rpc = rpc
        self._span = tracing.begin_call(rpc, _value_of(metadata, tracing.TRACEPARENT_KEY))
        self._started = time.monotonic()

    def end(self, code: str) -> None:
        seconds = time.monotonic() - self._started
        _seconds_of(self._rpc, code).observe(seconds)
        tracing.end_call(self._span, code)
        if is_debugging():
            log.debug("rpc", rpc=self._rpc, code=code, seconds=round(seconds, 5))


def _value_of(metadata: Iterable[tuple[str, str | bytes]], key: str) -> str:
    for name, value in metadata:
        if name == key and isinstance(value, str):
            return value
    return ""


def _code_of(error: BaseException, context: grpc.aio.ServicerContext[Any, Any]) -> str:
    if isinstance(error, grpc.aio.AbortError):
        return _CODE_NAMES.get(context.code(), "UNKNOWN")
    return "UNKNOWN" if isinstance(error, Exception) else "CANCELLED"
