"""Every call but the question for health needs a key, where keys are configured."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from typing import Any

import grpc
import structlog

from fusionroute.api_keys import MAX_KEY_CHARACTERS, ApiKeys
from fusionroute.errors import AccessDenied, Reason
from fusionroute.rpc_errors import abort_with

HEALTH_PREFIX = "/grpc.health.v1.Health/"
HEADER = "authorization"
SCHEME = "bearer "
LOG_PAUSE_SECONDS = 1.0

log = structlog.get_logger(__name__)


class AccessInterceptor(grpc.aio.ServerInterceptor):
    """Refuses calls without `authorization: Bearer KEY`, before their message is read.

    The name of the key is bound to the log context of the call as `caller`.

    Args:
        keys: what is accepted.
    """

    def __init__(self, keys: ApiKeys) -> None:
        self._keys = keys
        self._num_refused = 0
        self._logged_at = -LOG_PAUSE_SECONDS

    async def intercept_service(self, continuation: Any, handler_call_details: Any) -> Any:
        method: str = handler_call_details.method
        if method.startswith(HEALTH_PREFIX):
            return await continuation(handler_call_details)
        shown = shown_key(handler_call_details.invocation_metadata)
        name = None if shown is None else self._keys.name_of(shown)
        if name is None:
            # This kind of handler reads nothing by itself, and fits any kind of call.
            return grpc.stream_stream_rpc_method_handler(self._refusal(method, is_shown=shown is not None))
        structlog.contextvars.bind_contextvars(caller=name)
        return await continuation(handler_call_details)

    def _refusal(self, method: str, *, is_shown: bool) -> Any:
        what = "the key is not known here" if is_shown else "a key is needed: authorization: Bearer KEY"

        async def refuse(_: Any, context: grpc.aio.ServicerContext[Any, Any]) -> AsyncIterator[Any]:
            self._note(method, context.peer(), what)
            await abort_with(context, AccessDenied(Reason.UNAUTHENTICATED, f"{method} is refused: {what}"))
            yield  # type: ignore[unreachable]  # makes this an async generator, as a handler of streams must be

        return refuse

    def _note(self, method: str, peer: str, what: str) -> None:
        """One line a second at most: whoever knocks must not be able to fill the disk."""
        self._num_refused += 1
        now = time.monotonic()
        if now - self._logged_at >= LOG_PAUSE_SECONDS:
            log.warning("access_denied", rpc=method, peer=peer, message=what, num_refused=self._num_refused)
            self._logged_at, self._num_refused = now, 0


def shown_key(metadata: Any) -> bytes | None:
    """The key in a call's metadata; None where there is none, or several, or one that is too long to be one."""
    found = [value for key, value in metadata or () if key == HEADER]
    if len(found) != 1:
        return None
    value = found[0]
    text = value.decode("ascii", errors="replace") if isinstance(value, bytes) else str(value)
    if text[: len(SCHEME)].lower() != SCHEME:
        return None
    key = text[len(SCHEME) :].strip()
    return key.encode() if 0 < len(key) <= MAX_KEY_CHARACTERS else None
