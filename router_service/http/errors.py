"""The error tree as HTTP statuses; how a body looks is each API's own."""

from __future__ import annotations

import math

from fusionroute.errors import FusionRouteError, Reason, StatusCode

HTTP_STATUS: dict[StatusCode, int] = {
    StatusCode.CANCELLED: 499,
    StatusCode.INVALID_ARGUMENT: 400,
    StatusCode.OUT_OF_RANGE: 400,
    StatusCode.NOT_FOUND: 404,
    StatusCode.ALREADY_EXISTS: 409,
    StatusCode.FAILED_PRECONDITION: 409,
    StatusCode.ABORTED: 409,
    StatusCode.RESOURCE_EXHAUSTED: 429,
    StatusCode.DEADLINE_EXCEEDED: 504,
    StatusCode.UNIMPLEMENTED: 501,
    StatusCode.UNAVAILABLE: 503,
    StatusCode.UNAUTHENTICATED: 401,
    StatusCode.INTERNAL: 500,
}


def http_status(error: FusionRouteError) -> int:
    """The status of an error."""
    if (
        error.reason is Reason.RULE_NOT_AVAILABLE
    ):  # what was asked for cannot be had here: the caller's to change
        return 400
    return HTTP_STATUS[error.code]


def retry_headers(error: FusionRouteError) -> dict[str, str]:
    """`retry-after` in whole seconds, where trying again makes sense."""
    if error.retry_after_seconds is None:
        return {}
    return {"retry-after": str(max(1, math.ceil(error.retry_after_seconds)))}
