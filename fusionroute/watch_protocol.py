"""HTTP connections that callers cannot keep: who sends half a request, or sends nothing, is hung up on.

A watch port is asked by probes that restart a daemon which does not answer. So silent connections must never be the
reason for a refusal: there is a deadline for each request, and when there are too many connections the one that has
been silent for longest makes room for the new one.
"""

from __future__ import annotations

import asyncio

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

MOST_CONNECTIONS = 64


def patient_for(request_seconds: float, most_connections: int = MOST_CONNECTIONS) -> type[H11Protocol]:
    """A protocol for `uvicorn.Config(http=...)`.

    Args:
        request_seconds: how long a caller may take to send a whole request, once it is connected.
        most_connections: with more, the one that has been silent for longest is closed.
    """

    class Protocol(_BoundedProtocol):
        pass

    Protocol.request_seconds, Protocol.most_connections = request_seconds, most_connections
    return Protocol


class _BoundedProtocol(H11Protocol):
    """uvicorn's, with bounds on what a caller may hold."""

    request_seconds = 10.0
    most_connections = MOST_CONNECTIONS
    _deadline: asyncio.TimerHandle | None = None
    _silent_since = 0.0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn's
        super().connection_made(transport)
        self._wait_for_request(self.request_seconds)
        while len(self.connections) > self.most_connections:
            self._oldest_of_others()._hang_up()

    def connection_lost(self, exc: Exception | None) -> None:
        self._forget_deadline()
        super().connection_lost(exc)

    def on_response_complete(self) -> None:
        owes_body = self.conn.their_state is h11.SEND_BODY
        self._wait_for_request(
            self.request_seconds if owes_body else self.timeout_keep_alive + self.request_seconds
        )
        super().on_response_complete()

    def send_400_response(self, msg: str) -> None:
        """Status 400 without a body, which the answer to HEAD could not have; nothing where an answer is on its way."""
        if self._is_answering:
            self.cycle.disconnected = True  # what the application says from now on is for nobody
            self.cycle.message_event.set()
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            headers = [(b"content-length", b"0"), (b"connection", b"close")]
            bad = h11.Response(status_code=400, headers=headers, reason=b"Bad Request")
            self.transport.write(self.conn.send(bad) or b"")
            self.conn.send(h11.EndOfMessage())
        self.transport.close()

    @property
    def _is_answering(self) -> bool:
        return bool(self.cycle) and not self.cycle.response_complete  # there is none before the first request

    def _oldest_of_others(self) -> _BoundedProtocol:
        others = [
            each for each in self.connections if isinstance(each, _BoundedProtocol) and each is not self
        ]
        return min(others, key=lambda each: (each._is_answering, each._silent_since))

    def _wait_for_request(self, seconds: float) -> None:
        self._forget_deadline()
        self._silent_since = self.loop.time()
        self._deadline = self.loop.call_later(seconds, self._deadline_passed)

    def _forget_deadline(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _deadline_passed(self) -> None:
        if self._is_answering and not self.transport.is_closing():
            self._wait_for_request(self.request_seconds)
        else:
            self._hang_up()

    def _hang_up(self) -> None:
        """At once: a caller that does not read could delay a polite end for ever."""
        self.connections.discard(self)
        self.transport.abort()
