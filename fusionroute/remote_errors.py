"""What goes wrong at somebody else's server, in our tree: the URL, the status, and what it says."""

from __future__ import annotations

import json
import re
from typing import Protocol

from fusionroute.errors import (
    AccessDenied,
    FusionRouteError,
    InvalidRequest,
    OutOfRoom,
    Reason,
    Unavailable,
)

MAX_TOLD_CHARACTERS = 300

_TOO_LONG = re.compile(r"context|too long|too many tokens|`inputs`|max_(total|input)", re.IGNORECASE)


class Headers(Protocol):
    """Of an answer, by lower-case name."""

    def get(self, name: str, /) -> str | None:
        """None where there is none."""


def meaning_of(error: Exception, url: str) -> FusionRouteError | None:
    """An exception of the library in our tree; None: it is not the server's."""
    from huggingface_hub.errors import HfHubHTTPError, HTTPError  # type: ignore[attr-defined]

    if isinstance(error, TimeoutError):
        return Unavailable(Reason.REMOTE_UNAVAILABLE, f"{url} did not answer in time")
    cause = error if isinstance(error, HfHubHTTPError) else error.__cause__
    if isinstance(cause, HfHubHTTPError):
        response = cause.response
        return error_of_status(response.status_code, url, _told(response.text), response.headers)
    if isinstance(error, HTTPError | ConnectionError):
        return Unavailable(
            Reason.REMOTE_UNAVAILABLE, f"{url} does not answer: {type(error).__name__}: {error}"
        )
    return None


def error_of_status(status: int, url: str, told: str, headers: Headers) -> FusionRouteError:
    message = f"{url} answered {status}: {told}"
    retry_after = _seconds(headers.get("retry-after"))
    match status:
        case 401 | 403:
            return AccessDenied(Reason.UNAUTHENTICATED, message)
        case 408 | 424:  # a timeout; TGI's word for a model that failed
            return Unavailable(Reason.REMOTE_UNAVAILABLE, message, retry_after_seconds=retry_after)
        case 429:
            return OutOfRoom(Reason.QUEUE_FULL, message, retry_after_seconds=retry_after)
        case _ if status < 500:
            reason = Reason.CONTEXT_FULL if status == 413 or _TOO_LONG.search(told) else Reason.INVALID_FIELD
            return InvalidRequest(reason, message)
    return Unavailable(Reason.REMOTE_UNAVAILABLE, message, retry_after_seconds=retry_after)


def _told(body: str) -> str:
    """What an error's body says, in TGI's form or OpenAI's or none."""
    try:
        said = json.loads(body)["error"]
        said = said["message"] if isinstance(said, dict) else said
    except (ValueError, KeyError, TypeError):
        said = body
    return str(said)[:MAX_TOLD_CHARACTERS]


def _seconds(text: str | None) -> float | None:
    try:
        return max(0.0, float(text)) if text else None
    except ValueError:
        return None  # a date: our own pause will do
