"""The link between processes that share a model: orders of process 0, and each notices at once that another is gone.

    process 0 --- one TCP connection each ---> process 1, 2, ...
       sends a frame for each forward             reads, does the same, reads on

A frame is its length in four bytes, then its bytes; one without bytes is the farewell. A connection that ends without
a farewell means that the process at its other end is gone, and nobody waits for a collective operation to notice.
"""

from __future__ import annotations

import hmac
import secrets
import select
import socket
import struct
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Self

SECRET_BYTES = 32
HANDSHAKE_SECONDS = 5.0
"""How long one connection may take to say who it is, so that a stranger does not keep the others waiting."""
SEND_SECONDS = 30.0
"""A process that has not read for so long, while it had nothing else to do, is as good as gone."""
MAX_FRAME_BYTES = 64 << 20

_LENGTH = struct.Struct("!I")
_GREETING = struct.Struct(f"!{SECRET_BYTES}sI")
_READY = b"r"


class PeerLost(Exception):
    """Another process of the model is gone or does not answer; the text says which."""


OnLoss = Callable[[str], None]


class LeadEnd:
    """The end of the link at process 0. Use as a context manager, which says farewell at its end.

    Args:
        host: address of this machine at which the other processes reach it.
        num_followers: how many there are.
    """

    def __init__(self, host: str, num_followers: int) -> None:
        self.secret = secrets.token_bytes(SECRET_BYTES)
        self._num_followers = num_followers
        self._listener = socket.create_server((host, 0))
        self._followers: dict[int, socket.socket] = {}
        self._sending = threading.Lock()
        self._losing = threading.Lock()
        self._closing = threading.Event()
        self._watcher: threading.Thread | None = None
        self._on_loss: OnLoss = lambda why: None
        self.lost: str | None = None

    @property
    def port(self) -> int:
        """Where followers connect."""
        port: int = self._listener.getsockname()[1]
        return port

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._closing.set()
        if kind is None and self.lost is None:
            for follower in self._followers.values():
                try:
                    follower.sendall(_LENGTH.pack(0))
                except OSError:
                    continue  # it is gone already, which is what it was to be
        for each in (self._listener, *self._followers.values()):
            each.close()
        if self._watcher is not None and self._watcher is not threading.current_thread():
            self._watcher.join(timeout=1.0)

    def accept(self, timeout_seconds: float) -> None:
        """Waits for all followers. Raises PeerLost naming the ranks that have not come."""
        deadline = time.monotonic() + timeout_seconds
        while len(self._followers) < self._num_followers:
            self._listener.settimeout(max(0.01, deadline - time.monotonic()))
            try:
                connection, _ = self._listener.accept()
            except TimeoutError:
                missing = sorted(set(range(1, self._num_followers + 1)) - set(self._followers))
                raise PeerLost(
                    f"processes {missing} have not come within {timeout_seconds} seconds"
                ) from None
            if (rank := self._greeted(connection)) is None:
                connection.close()
            else:
                _prepare(connection)
                self._followers[rank] = connection

    def _greeted(self, connection: socket.socket) -> int | None:
        """Which follower this is; None for a stranger."""
        connection.settimeout(HANDSHAKE_SECONDS)
        try:
            secret, rank = _GREETING.unpack(_read(connection, _GREETING.size))
        except (OSError, EOFError):
            return None
        is_expected = 1 <= rank <= self._num_followers and rank not in self._followers
        return int(rank) if hmac.compare_digest(secret, self.secret) and is_expected else None

    def wait_until_ready(self, timeout_seconds: float) -> None:
        """Waits until every follower says so. Raises PeerLost."""
        deadline = time.monotonic() + timeout_seconds
        for rank, follower in self._followers.items():
            follower.settimeout(max(0.01, deadline - time.monotonic()))
            try:
                _read(follower, len(_READY))
            except TimeoutError:
                raise PeerLost(f"process {rank} is not ready after {timeout_seconds} seconds") from None
            except (OSError, EOFError):
                raise PeerLost(f"process {rank} has ended before it was ready") from None
            follower.settimeout(SEND_SECONDS)
        self.send(_READY)

    def watch(self, on_loss: OnLoss) -> None:
        """From now on, calls `on_loss` once, in any thread, when the processes are no longer one model."""
        self._on_loss = on_loss
        self._watcher = threading.Thread(target=self._watch, name="parallel link", daemon=True)
        self._watcher.start()

    def _watch(self) -> None:
        poll = select.poll()
        ranks = {follower.fileno(): rank for rank, follower in self._followers.items()}
        for descriptor in ranks:
            poll.register(descriptor, select.POLLIN)
        while not self._closing.is_set():
            ended = poll.poll(500)
            if ended and not self._closing.is_set():
                self.lose(f"process {ranks[ended[0][0]]} of the model has ended")
                return

    def lose(self, why: str) -> None:
        """Notes that the processes are no longer one model; the first reason stays."""
        with self._losing:
            is_first = self.lost is None
            self.lost = self.lost or why
        if is_first:
            self._on_loss(why)

    def send(self, frame: bytes) -> None:
        """One frame to every follower. Raises PeerLost."""
        if self.lost is not None:
            raise PeerLost(self.lost)
        data = _LENGTH.pack(len(frame)) + frame
        with self._sending:
            for rank, follower in self._followers.items():
                try:
                    follower.sendall(data)
                except OSError as error:
                    why = f"process {rank} of the model cannot be reached: {error}"
                    self.lose(why)
                    raise PeerLost(why) from error


class FollowerEnd:
    """The end of the link at another process. Use as a context manager.

    Raises:
        PeerLost: process 0 is not there.
    """

    def __init__(self, host: str, port: int, secret: bytes, rank: int, timeout_seconds: float) -> None:
        try:
            self._lead = socket.create_connection((host, port), timeout=timeout_seconds)
            self._lead.sendall(_GREETING.pack(secret, rank))
        except OSError as error:
            raise PeerLost(f"process 0 of the model cannot be reached: {error}") from error
        _prepare(self._lead)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._lead.close()

    def wait_until_ready(self, timeout_seconds: float) -> None:
        """Says that this process is ready and waits for the others. Raises PeerLost."""
        try:
            self._lead.sendall(_READY)
            self._lead.settimeout(timeout_seconds)
            answer = self._frame()
        except (OSError, EOFError) as error:
            raise PeerLost("process 0 of the model has ended or is not ready in time") from error
        if answer != _READY:
            raise PeerLost("process 0 of the model has given up")

    def receive(self) -> bytes | None:
        """The next frame, however long it takes; None at the farewell. Raises PeerLost."""
        self._lead.settimeout(None)
        try:
            return self._frame() or None
        except (OSError, EOFError) as error:
            raise PeerLost("process 0 of the model has ended") from error

    def _frame(self) -> bytes:
        (length,) = _LENGTH.unpack(_read(self._lead, _LENGTH.size))
        if length > MAX_FRAME_BYTES:
            raise EOFError(f"a frame of {length} bytes, limit {MAX_FRAME_BYTES}")
        return _read(self._lead, length)


def _read(connection: socket.socket, num_bytes: int) -> bytes:
    """Exactly so many bytes. Raises EOFError, OSError."""
    data = bytearray()
    while len(data) < num_bytes:
        piece = connection.recv(num_bytes - len(data))
        if not piece:
            raise EOFError
        data += piece
    return bytes(data)


def _prepare(connection: socket.socket) -> None:
    """Frames leave at once; a machine that is gone without a word is noticed within half a minute."""
    connection.settimeout(SEND_SECONDS)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (("TCP_KEEPIDLE", 10), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 3)):
        if hasattr(socket, name):  # not on every system
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
