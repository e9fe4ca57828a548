"""Errors keep their meaning across gRPC, and peers that are not ours are still understood."""

from __future__ import annotations

import grpc
import pytest
from google.protobuf import any_pb2
from google.rpc import error_details_pb2, status_pb2  # type: ignore[import-untyped]

from fusionroute.errors import (
    FusionRouteError,
    InternalFault,
    InvalidRequest,
    ModelRejected,
    OutOfRoom,
    Reason,
    SessionStateError,
    StatusCode,
    Unavailable,
    invalid,
)
from fusionroute.rpc_errors import DETAILS_KEY, error_from_rpc, error_to_status, make_error


def rpc_error(code: grpc.StatusCode, message: str = "", status: object = None) -> grpc.aio.AioRpcError:
    details = [(DETAILS_KEY, status.SerializeToString())] if status is not None else []  # type: ignore[attr-defined]
    return grpc.aio.AioRpcError(
        code, grpc.aio.Metadata(), grpc.aio.Metadata(*details), message, debug_error_string=""
    )


def there_and_back(error: FusionRouteError) -> FusionRouteError:
    code = next(code for code in grpc.StatusCode if code.value[0] == int(error.code))
    return error_from_rpc(rpc_error(code, error.message, error_to_status(error)))


@pytest.mark.parametrize("reason", list(Reason), ids=lambda reason: reason.value)
def test_every_reason_survives_the_wire(reason: Reason) -> None:
    sent = FusionRouteError(reason, "why", metadata={"cached_length": "7"}, retry_after_seconds=0.25)
    received = there_and_back(sent)
    assert (received.reason, received.message, received.cached_length) == (reason, "why", 7)
    assert received.retry_after_seconds == 0.25


@pytest.mark.parametrize(
    ("reason", "error_class"),
    [
        (Reason.TOKEN_OUT_OF_RANGE, InvalidRequest),
        (Reason.SESSION_UNKNOWN, SessionStateError),
        (Reason.KV_MEMORY_FULL, OutOfRoom),
        (Reason.DRAINING, Unavailable),
        (Reason.VOCABULARY_MISMATCH, ModelRejected),
        (Reason.NON_FINITE_LOGITS, InternalFault),
    ],
)
def test_a_reason_comes_back_as_its_class(reason: Reason, error_class: type[FusionRouteError]) -> None:
    assert type(there_and_back(FusionRouteError(reason, "why"))) is error_class


def test_an_error_without_a_hint_has_none_after_the_wire() -> None:
    assert there_and_back(FusionRouteError(Reason.SESSION_BUSY, "why")).retry_after_seconds is None


def test_a_bad_field_is_named_in_a_field_violation() -> None:
    status = error_to_status(invalid("top_p", 2.0, "in (0, 1]"))
    request = error_details_pb2.BadRequest()
    assert any(detail.Unpack(request) for detail in status.details if detail.Is(request.DESCRIPTOR))
    assert [(v.field, v.description) for v in request.field_violations] == [("top_p", "in (0, 1]")]


@pytest.mark.parametrize(
    ("code", "error_class", "reason"),
    [
        (grpc.StatusCode.UNAVAILABLE, Unavailable, Reason.EXPERT_UNAVAILABLE),
        (grpc.StatusCode.CANCELLED, Unavailable, Reason.EXPERT_UNAVAILABLE),
        (grpc.StatusCode.DEADLINE_EXCEEDED, Unavailable, Reason.DEADLINE_PASSED),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, OutOfRoom, Reason.QUEUE_FULL),
        (grpc.StatusCode.UNIMPLEMENTED, InternalFault, Reason.INTERNAL),
        # Not SESSION_UNKNOWN: only our own answer may cause a replay.
        (grpc.StatusCode.NOT_FOUND, InternalFault, Reason.INTERNAL),
    ],
)
def test_what_grpc_itself_says_is_understood_by_its_code(
    code: grpc.StatusCode, error_class: type[FusionRouteError], reason: Reason
) -> None:
    error = error_from_rpc(rpc_error(code, "connection refused"), peer="127.0.0.1:9")
    assert (type(error), error.reason) == (error_class, reason)
    assert "127.0.0.1:9" in error.message
    assert "connection refused" in error.message


def test_a_message_too_large_is_not_taken_for_a_full_queue() -> None:
    text = "CLIENT: Received message larger than max (500 vs. 100)"
    error = error_from_rpc(rpc_error(grpc.StatusCode.RESOURCE_EXHAUSTED, text))
    assert isinstance(error, InvalidRequest)
    assert "max_message_bytes" in error.message
    assert "500 vs. 100" in error.message


def test_details_of_another_domain_are_not_taken_for_ours() -> None:
    packed = any_pb2.Any()
    packed.Pack(error_details_pb2.ErrorInfo(domain="example.com", reason="SESSION_UNKNOWN"))
    status = status_pb2.Status(code=14, message="proxy", details=[packed])
    error = error_from_rpc(rpc_error(grpc.StatusCode.UNAVAILABLE, "proxy", status))
    assert error.reason is Reason.EXPERT_UNAVAILABLE


def test_a_reason_of_a_newer_version_keeps_the_class_of_its_code() -> None:
    error = make_error(StatusCode.RESOURCE_EXHAUSTED, "GPU_ON_FIRE", "hot", {}, 2.0)
    assert isinstance(error, OutOfRoom)
    assert error.retry_after_seconds == 2.0


def test_a_very_long_message_still_fits_into_trailing_metadata() -> None:
    status = error_to_status(invalid("prompt", "x" * 100_000, "short"))
    assert len(status.SerializeToString()) < 8192
