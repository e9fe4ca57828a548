"""The error tree on the gRPC wire: google.rpc.Status with ErrorInfo, RetryInfo, BadRequest, and back."""

from __future__ import annotations

import inspect
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, NoReturn

import grpc
import structlog
from google.protobuf import duration_pb2
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2  # type: ignore[import-untyped]

from fusionroute.errors import (
    CLASS_BY_CODE,
    AccessDenied,
    FusionRouteError,
    InternalFault,
    InvalidRequest,
    ModelRejected,
    OutOfRoom,
    Reason,
    StatusCode,
    Unavailable,
)

ERROR_DOMAIN = "fusionroute"
DETAILS_KEY = "grpc-status-details-bin"
TRANSPORT = "transport"
"""Metadata of errors that gRPC itself made: its status code."""
_BROKEN = frozenset({"UNAVAILABLE", "CANCELLED", "DEADLINE_EXCEEDED", "INTERNAL", "UNKNOWN"})
# Trailing metadata is limited to 8 KiB by default and carries the message twice.
MAX_MESSAGE_CHARACTERS = 1500

log = structlog.get_logger(__name__)

_MODEL_REASONS = frozenset(
    {
        Reason.MODEL_NOT_FOUND,
        Reason.MODEL_UNSUPPORTED,
        Reason.MODEL_BROKEN,
        Reason.CHECKPOINT_INCOMPLETE,
        Reason.VOCABULARY_MISMATCH,
    }
)
_GRPC_CODES: dict[int, grpc.StatusCode] = {code.value[0]: code for code in grpc.StatusCode}


def make_error(
    code: int,
    reason: str,
    message: str,
    metadata: Mapping[str, str] | None = None,
    retry_after_seconds: float | None = None,
) -> FusionRouteError:
    """The error of our tree for what a peer said.

    Args:
        code: google.rpc.Code.
        reason: ErrorInfo.reason; an unknown or empty one falls back on what the code alone allows to say.
        message: for people.
        metadata: ErrorInfo.metadata.
        retry_after_seconds: RetryInfo, None where there was none.
    """
    known = Reason.__members__.get(reason)
    if known is None:
        return _error_without_reason(code, message, metadata, retry_after_seconds)
    error_class = ModelRejected if known in _MODEL_REASONS else CLASS_BY_CODE.get(known.code, InternalFault)
    return error_class(known, message, metadata=metadata, retry_after_seconds=retry_after_seconds)


def _error_without_reason(
    code: int, message: str, metadata: Mapping[str, str] | None, retry_after_seconds: float | None
) -> FusionRouteError:
    """For peers that gave no reason of ours: gRPC itself, a proxy, or a newer version."""
    table: dict[int, tuple[type[FusionRouteError], Reason]] = {
        StatusCode.INVALID_ARGUMENT: (InvalidRequest, Reason.INVALID_FIELD),
        StatusCode.OUT_OF_RANGE: (InvalidRequest, Reason.INVALID_FIELD),
        StatusCode.RESOURCE_EXHAUSTED: (OutOfRoom, Reason.QUEUE_FULL),
        StatusCode.DEADLINE_EXCEEDED: (Unavailable, Reason.DEADLINE_PASSED),
        StatusCode.UNAVAILABLE: (Unavailable, Reason.EXPERT_UNAVAILABLE),
        StatusCode.CANCELLED: (Unavailable, Reason.EXPERT_UNAVAILABLE),
        StatusCode.UNAUTHENTICATED: (AccessDenied, Reason.UNAUTHENTICATED),
    }
    error_class, reason = table.get(code, (InternalFault, Reason.INTERNAL))
    name = _GRPC_CODES[code].name if code in _GRPC_CODES else str(code)
    text = message if error_class is not InternalFault else f"the peer answered {name}: {message}"
    return error_class(reason, text, metadata=metadata, retry_after_seconds=retry_after_seconds)


def error_to_status(error: FusionRouteError) -> status_pb2.Status:
    """The google.rpc.Status of an error: ErrorInfo always, RetryInfo and BadRequest where they apply."""
    status = status_pb2.Status(code=int(error.code), message=error.message[:MAX_MESSAGE_CHARACTERS])
    metadata = {
        name: value for name, value in error.metadata.items() if name != TRANSPORT
    }  # it was our call's
    info = error_details_pb2.ErrorInfo(reason=error.reason.value, domain=ERROR_DOMAIN, metadata=metadata)
    status.details.add().Pack(info)
    if error.retry_after_seconds is not None:
        delay = duration_pb2.Duration()
        delay.FromNanoseconds(int(error.retry_after_seconds * 1e9))
        status.details.add().Pack(error_details_pb2.RetryInfo(retry_delay=delay))
    field = error.metadata.get("field")
    if field is not None:
        violation = error_details_pb2.BadRequest.FieldViolation(
            field=field, description=error.metadata.get("limit", status.message)
        )
        status.details.add().Pack(error_details_pb2.BadRequest(field_violations=[violation]))
    return status


def error_from_rpc(error: grpc.aio.AioRpcError, peer: str = "") -> FusionRouteError:
    """What a failed call means in our tree.

    Args:
        error: as grpc.aio raised it.
        peer: host:port for messages that gRPC itself made, such as a refused connection.
    """
    for key, value in error.trailing_metadata() or ():
        if key == DETAILS_KEY and isinstance(value, bytes):
            found = _error_from_details(status_pb2.Status.FromString(value))
            if found is not None:
                return found
    code = int(error.code().value[0])
    message = error.details() or error.code().name
    if code == StatusCode.RESOURCE_EXHAUSTED and "larger than max" in message:
        return InvalidRequest(
            Reason.INVALID_FIELD,
            f"{message}: the message exceeds max_message_bytes; ask for fewer rows or tokens in one call, "
            "or raise max_message_bytes on both ends",
            metadata={"field": "max_message_bytes", "limit": message},
        )
    metadata = {TRANSPORT: error.code().name}
    return make_error(code, "", f"{peer}: {message}" if peer else message, metadata)


def was_transport(error: FusionRouteError) -> bool:
    """Whether a call ended with its connection or its deadline, and not by a word of the service."""
    return error.metadata.get(TRANSPORT) in _BROKEN


def error_from_peer(error: grpc.aio.AioRpcError, peer: str) -> FusionRouteError:
    """As `error_from_rpc`, for a call made on somebody's behalf: if the peer refuses *us*, it is not available.

    Our caller has shown a key that is known here; UNAUTHENTICATED would tell them that they had not.
    """
    found = error_from_rpc(error, peer)
    if not isinstance(found, AccessDenied):
        return found
    log.error(
        "peer_refuses_us", peer=peer, message=found.message, note="see api_key_file and the peer's keys"
    )
    return Unavailable(Reason.EXPERT_UNAVAILABLE, f"{peer} does not accept the key of this service")


def _error_from_details(status: status_pb2.Status) -> FusionRouteError | None:
    """The error within rich details, or None when they are not ours."""
    info = error_details_pb2.ErrorInfo()
    retry = error_details_pb2.RetryInfo()
    retry_after_seconds: float | None = None
    ours = False
    for detail in status.details:
        if detail.Is(info.DESCRIPTOR):
            detail.Unpack(info)
            ours = info.domain == ERROR_DOMAIN
        elif detail.Is(retry.DESCRIPTOR):
            detail.Unpack(retry)
            retry_after_seconds = retry.retry_delay.ToNanoseconds() / 1e9
    if not ours:
        return None
    return make_error(status.code, info.reason, status.message, dict(info.metadata), retry_after_seconds)


class ErrorInterceptor(grpc.aio.ServerInterceptor):
    """Turns what our servicers raise into statuses: our errors with their details, all else INTERNAL."""

    async def intercept_service(self, continuation: Any, handler_call_details: Any) -> Any:
        handler = await continuation(handler_call_details)
        method: str = handler_call_details.method
        if handler is None or not method.startswith("/fusionroute."):
            return handler
        if handler.unary_unary is not None:
            return grpc.unary_unary_rpc_method_handler(
                _guard_unary(handler.unary_unary, method),
                request_deserializer=_lenient(handler.request_deserializer),
                response_serializer=handler.response_serializer,
            )
        if handler.unary_stream is not None:
            return grpc.unary_stream_rpc_method_handler(
                _guard_stream(handler.unary_stream, method),
                request_deserializer=_lenient(handler.request_deserializer),
                response_serializer=handler.response_serializer,
            )
        if handler.stream_stream is not None:
            return grpc.stream_stream_rpc_method_handler(
                _guard_both_streams(handler.stream_stream, method),
                request_deserializer=_lenient(handler.request_deserializer),
                response_serializer=handler.response_serializer,
            )
        return handler


@dataclass(frozen=True, slots=True)
class _Unreadable:
    """Stands for a request whose bytes are no message of its type."""

    size_bytes: int

    def error(self, method: str) -> InvalidRequest:
        return InvalidRequest(
            Reason.INVALID_FIELD,
            f"the {self.size_bytes} bytes sent to {method} are not a message of its request type",
            metadata={"field": "request", "limit": "a message as the contract defines it"},
        )


def _lenient(deserialize: Callable[[bytes], Any] | None) -> Callable[[bytes], Any] | None:
    """A deserializer that does not raise: gRPC would answer UNKNOWN, as if the fault were ours, and log a traceback."""
    if deserialize is None:
        return None
    strict = deserialize

    def read(data: bytes) -> Any:
        try:
            return strict(data)
        except DecodeError:
            return _Unreadable(len(data))

    return read


def _guard_unary(behaviour: Callable[[Any, Any], Awaitable[Any]], method: str) -> Callable[[Any, Any], Any]:
    async def guarded(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
        if isinstance(request, _Unreadable):
            await abort_with(context, request.error(method))
        try:
            return await behaviour(request, context)
        except Exception as error:
            await _abort(context, error, method)

    return guarded


def _guard_stream(
    behaviour: Callable[[Any, Any], AsyncGenerator[Any, None]], method: str
) -> Callable[[Any, Any], AsyncIterator[Any]]:
    assert inspect.isasyncgenfunction(behaviour), f"{method} must be an async generator"

    async def guarded(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> AsyncIterator[Any]:
        if isinstance(request, _Unreadable):
            await abort_with(context, request.error(method))
        stream = behaviour(request, context)
        try:
            async for response in stream:
                yield response
        except Exception as error:
            await _abort(context, error, method)
        finally:
            # A client that leaves cancels us; the servicer's cleanup must run now, not at garbage collection.
            with suppress(Exception):
                await stream.aclose()

    return guarded


def _guard_both_streams(
    behaviour: Callable[[Any, Any], AsyncGenerator[Any, None]], method: str
) -> Callable[[Any, Any], AsyncIterator[Any]]:
    guarded = _guard_stream(behaviour, method)

    def readable(requests: AsyncIterator[Any], context: Any) -> AsyncIterator[Any]:
        return guarded(_Readable(requests, method), context)

    return readable


class _Readable:
    """The messages of a caller's stream; raises InvalidRequest at the first that is none."""

    __slots__ = ("_method", "_requests")

    def __init__(self, requests: AsyncIterator[Any], method: str) -> None:
        self._requests = requests
        self._method = method

    def __aiter__(self) -> _Readable:
        return self

    async def __anext__(self) -> Any:
        request = await anext(self._requests)
        if isinstance(request, _Unreadable):
            raise request.error(self._method)
        return request


async def _abort(context: grpc.aio.ServicerContext[Any, Any], error: Exception, method: str) -> NoReturn:
    if isinstance(error, grpc.aio.AbortError):
        raise error
    await abort_with(context, told(error, method))


def told(error: Exception, method: str) -> FusionRouteError:
    """What a caller of `method` is told of an exception; what is our own fault is logged."""
    if not isinstance(error, FusionRouteError):
        fault = uuid.uuid4().hex[:12]
        log.error("rpc_failed", rpc=method, fault=fault, exc_info=error)
        return InternalFault(
            Reason.INTERNAL,
            f"{method} failed with {type(error).__name__}; the service's log has it as fault {fault}",
            metadata={"fault": fault},
        )
    if error.code == StatusCode.INTERNAL:
        log.error("rpc_failed", rpc=method, reason=error.reason.value, message=error.message)
    return error


async def abort_with(context: grpc.aio.ServicerContext[Any, Any], error: FusionRouteError) -> NoReturn:
    """Ends a call with an error of our tree."""
    status = error_to_status(error)
    details = ((DETAILS_KEY, status.SerializeToString()),)
    await context.abort(_GRPC_CODES[status.code], status.message, details)
    raise AssertionError("context.abort raises")
