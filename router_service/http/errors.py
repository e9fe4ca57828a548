"""The error tree as HTTP statuses, and in the form of OpenAI's API; other APIs have forms of their own."""

from __future__ import annotations

import math

from starlette.responses import JSONResponse

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

KINDS = {
    401: "authentication_error",
    404: "not_found_error",
    409: "conflict_error",
    429: "rate_limit_error",
    499: "cancelled",
}
"""`type` of an error's body by status; other 4xx are invalid_request_error, 5xx server_error."""

PARAMETERS = {
    "text": "prompt",
    "token_ids": "prompt",
    "fixed_expert": "fusionroute.expert",
    "combine": "fusionroute.combine",
    "expert_choice": "fusionroute.expert_choice",
    "num_top_candidates": "fusionroute.num_candidates",
    "session_id": "fusionroute.session_id",
    "drafting": "fusionroute.drafting",
    "constraint.json_schema": "response_format",
    "constraint.grammar": "tools",
    "on_expert_unavailable": "fusionroute.on_expert_unavailable",
}
"""Fields of the gRPC contract that are called otherwise here."""


CALLERS_TO_CHANGE = frozenset({Reason.RULE_NOT_AVAILABLE, Reason.CONSTRAINT_FAILED})
"""Asked for what cannot be had here, whatever the state of anything."""


def http_status(error: FusionRouteError) -> int:
    """The status of an error."""
    if error.reason in CALLERS_TO_CHANGE:
        return 400
    return HTTP_STATUS[error.code]


def retry_headers(error: FusionRouteError) -> dict[str, str]:
    """`retry-after` in whole seconds, where trying again makes sense."""
    if error.retry_after_seconds is None:
        return {}
    return {"retry-after": str(max(1, math.ceil(error.retry_after_seconds)))}


def openai_body(
    status: int, message: str, code: str | None = None, param: str | None = None
) -> dict[str, object]:
    """An error as OpenAI's clients read it.

    Args:
        status: decides its `type`.
        message: for people.
        code: for programs.
        param: the field of the request that it is about.
    """
    kind = KINDS.get(status, "server_error" if status >= 500 else "invalid_request_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def openai_error_body(error: FusionRouteError) -> dict[str, object]:
    """One of our errors as OpenAI's clients read it."""
    field = error.metadata.get("field")
    param = PARAMETERS.get(field, field) if field is not None else None
    code = "context_length_exceeded" if error.reason is Reason.CONTEXT_FULL else error.reason.value.lower()
    return openai_body(http_status(error), _message(error), code, param)


def _message(error: FusionRouteError) -> str:
    """With the words by which clients that shorten prompts know that they must: they read no codes."""
    longest = error.metadata.get("limit", "")
    if error.reason is not Reason.CONTEXT_FULL or not longest.isdecimal():
        return error.message
    return f"{error.message}: this model's maximum context length is {int(longest) + 1} tokens"


def openai_error(error: FusionRouteError) -> JSONResponse:
    """The answer to a request that failed before anything of its answer was sent."""
    return JSONResponse(openai_error_body(error), http_status(error), retry_headers(error))
