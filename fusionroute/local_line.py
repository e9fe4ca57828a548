"""Messages between two processes of one host over a socket of their own, without the threads that gRPC needs.

    caller                                              service
    LineListener: waits at an abstract address
    address, proof  ---- first message of a stream -->  connect_line: is it our own user who waits there?
                    <------------ proof --------------  the first message over the line
    is it our own user, and the proof right?
    the stream's messages go both ways over the line, each after its length (4 bytes, little-endian)

An abstract address (Linux) is no file: it is gone with the socket, however its process ends. Other users of the host
can reach it, which is why both sides ask the kernel whose process the other one is.
"""

from __future__ import annotations

import asyncio
import os
import re
import secrets
import socket
import struct
from collections import deque
from collections.abc import Callable
from contextlib import suppress

PREFIX = "fusionroute-line-"
CONNECT_SECONDS = 1.0
_ADDRESS = re.compile(re.escape(PREFIX) + r"[0-9a-f]{32}")
_LENGTH = struct.Struct("<I")
_CREDENTIALS = struct.Struct("3i")


class LineRefused(Exception):
    """There can be no line; the message says why. Messages go over the stream then."""


class MessageLine(asyncio.Protocol):
    """One end of a line.

    Args:
        most_bytes: a longer message ends the line.
    """

    def __init__(self, most_bytes: int) -> None:
        self._most_bytes = most_bytes
        self._transport: asyncio.Transport | None = None
        self._rest = bytearray()
        self._unheard: deque[bytes] = deque()
        self._has_news = asyncio.Event()
        self._is_lost = False
        self._on_message: Callable[[bytes], None] | None = None
        self._on_lost: Callable[[], None] | None = None

    @property
    def is_open(self) -> bool:
        """Whether messages can be sent."""
        return self._transport is not None and not self._transport.is_closing()

    def send(self, message: bytes) -> None:
        """Sends a message; at once, as far as the other side has room for it."""
        assert self._transport is not None
        self._transport.writelines((_LENGTH.pack(len(message)), message))

    async def first(self) -> bytes | None:
        """The first message, before anybody listens; None when the line has ended without one."""
        while not self._unheard and not self._is_lost:
            self._has_news.clear()
            await self._has_news.wait()
        return self._unheard.popleft() if self._unheard else None

    def listen(self, on_message: Callable[[bytes], None], on_lost: Callable[[], None]) -> None:
        """From now on messages are told, those that have come before at once; and the end of the line, once."""
        self._on_message, self._on_lost = on_message, on_lost
        while self._unheard:
            on_message(self._unheard.popleft())
        if self._is_lost:
            on_lost()

    def close(self) -> None:
        """Ends the line; nobody is told on this side."""
        self._on_lost = None
        self._on_message = _nothing
        if self._transport is not None:
            self._transport.abort()

    # --- called by asyncio -----------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        rest = self._rest
        rest += data
        start = 0
        while len(rest) - start >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(rest, start)
            if length > self._most_bytes:
                self._break()
                return
            stop = start + _LENGTH.size + length
            if stop > len(rest):
                break
            message = bytes(memoryview(rest)[start + _LENGTH.size : stop])
            start = stop
            self._tell(message)
        del rest[:start]

    def pause_writing(self) -> None:
        """Who does not read the answers is not read from either."""
        assert self._transport is not None
        self._transport.pause_reading()

    def resume_writing(self) -> None:
        assert self._transport is not None
        self._transport.resume_reading()

    def connection_lost(self, error: Exception | None) -> None:
        self._is_lost = True
        self._has_news.set()
        on_lost, self._on_lost = self._on_lost, None
        if on_lost is not None:
            on_lost()

    def _tell(self, message: bytes) -> None:
        if self._on_message is None:
            self._unheard.append(message)
            self._has_news.set()
            return
        try:
            self._on_message(message)
        except Exception:
            self._break()
            raise

    def _break(self) -> None:
        """Ends the line from this side and says so here too."""
        on_lost = self._on_lost
        self.close()
        if on_lost is not None:
            on_lost()


class LineListener:
    """The caller's end before anybody has connected.

    Attributes:
        address: where the service finds it.
    """

    def __init__(self) -> None:
        """Raises LineRefused where the system has no such addresses."""
        self.address = PREFIX + secrets.token_hex(16)
        try:
            self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            self._socket.setblocking(False)
            self._socket.bind("\0" + self.address)
            self._socket.listen(4)
        except OSError as error:
            raise LineRefused(f"no socket can be made: {error.strerror}") from None

    async def accept(self, proof: bytes, most_bytes: int) -> MessageLine:
        """The line to whoever shows the proof. To be cancelled when nobody comes."""
        loop = asyncio.get_running_loop()
        while True:
            accepted, _ = await loop.sock_accept(self._socket)
            if not _is_our_own(accepted):
                accepted.close()
                continue
            line = MessageLine(most_bytes)
            try:
                await loop.connect_accepted_socket(lambda line=line: line, accepted)  # type: ignore[misc]
                if secrets.compare_digest(await line.first() or b"", proof):
                    return line
            except BaseException:  # cancelled, above all
                line.close()
                accepted.close()
                raise
            line.close()

    def close(self) -> None:
        """Nobody can connect any more."""
        with suppress(OSError):
            self._socket.close()


def check_address(address: str) -> None:
    """Raises LineRefused unless this can be the address of a listener."""
    if _ADDRESS.fullmatch(address) is None:
        raise LineRefused("this is no address of a line")


async def connect_line(address: str, proof: bytes, most_bytes: int) -> MessageLine:
    """The service's end.

    Raises:
        LineRefused: nobody waits there, or somebody else does.
    """
    check_address(address)
    loop = asyncio.get_running_loop()
    connecting = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connecting.setblocking(False)
    line = MessageLine(most_bytes)
    try:
        async with asyncio.timeout(CONNECT_SECONDS):
            await loop.sock_connect(connecting, "\0" + address)
            if not _is_our_own(connecting):
                raise LineRefused("another user waits there")
            await loop.create_unix_connection(lambda: line, sock=connecting)
    except (OSError, TimeoutError) as error:
        connecting.close()
        raise LineRefused(f"nobody can be reached there: {error}") from None
    except BaseException:
        connecting.close()
        raise
    line.send(proof)
    return line


def _is_our_own(connected: socket.socket) -> bool:
    """Whether the process at the other end is of our own user."""
    credentials = connected.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    return bool(_CREDENTIALS.unpack(credentials)[1] == os.geteuid())


def _nothing(message: bytes) -> None:
    """Nobody wants to know."""
