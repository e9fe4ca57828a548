"""From ready to stopped: what a daemon does around its server."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import structlog

if TYPE_CHECKING:
    from fusionroute.grpc_runtime import RunningServer

log = structlog.get_logger(__name__)


def write_ready_file(
    path: Path, address: str, watch_address: str | None = None, http_url: str | None = None
) -> None:
    """Writes "HOST:PORT\\n" so that a reader sees all of it or nothing.

    Further lines name the watch port, HOST:PORT, and where applications are served over HTTP, a URL; if any.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    lines = [line for line in (address, watch_address, http_url) if line is not None]
    temporary.write_text("\n".join(lines) + "\n", encoding="ascii")
    temporary.replace(path)


def set_aside_what_stays() -> None:
    """Spares the garbage collector all objects of now; to be called when loading is done.

    Torch and transformers bring 400,000 objects that stay. Python looks for cycles among the old objects only when
    their number has grown by a quarter; gRPC leaves a few in cycles with every call and a hundred with every stream
    that is cancelled, so tens of megabytes would gather, and then one look would stop all streams for 0.3 s.
    A model that is replaced later is freed all the same: nothing in it refers back to it.
    """
    gc.collect()
    gc.freeze()


async def serve_until_signalled(
    running: RunningServer,
    *,
    drain: Callable[[float], Awaitable[None]],
    drain_seconds: float,
    ready_file: Path | None = None,
    watch_address: str | None = None,
    http_url: str | None = None,
    ended: asyncio.Future[str] | None = None,
) -> None:
    """Says ready, waits for SIGTERM or SIGINT, drains, stops. A second signal ends the process at once.

    Args:
        running: the server.
        drain: gets the seconds it has; refuses new work and returns when the running work is done.
        drain_seconds: most time for it.
        ready_file: receives HOST:PORT while we serve.
        watch_address: HOST:PORT of the watch port, None without one; also told in the ready file.
        http_url: where applications are served over HTTP, None where they are not; also told in the ready file.
        ended: done with a reason when it must stop without having been told to.
    """
    loop = asyncio.get_running_loop()
    signalled: asyncio.Future[signal.Signals] = loop.create_future()

    def note(number: signal.Signals) -> None:
        for each in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(each)
            # The default action needs no event loop, so it works even when ours is stuck.
            signal.signal(each, signal.SIG_DFL)
        if not signalled.done():
            signalled.set_result(number)

    for each in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(each, note, each)
    set_aside_what_stays()
    print(f"ready on {running.address}", flush=True)
    log.info("ready", address=running.address)
    if ready_file is not None:
        write_ready_file(ready_file, running.address, watch_address, http_url)
    endings: list[asyncio.Future[Any]] = [signalled] if ended is None else [signalled, ended]
    await asyncio.wait(endings, return_when=asyncio.FIRST_COMPLETED)
    why = signalled.result().name if signalled.done() else "none"
    log.info("draining", signal=why, drain_seconds=drain_seconds, note="a second signal stops at once")
    if ready_file is not None:
        ready_file.unlink(missing_ok=True)  # noqa: ASYNC240 - one small local file
    await running.begin_drain()
    started_at = time.monotonic()
    try:
        async with asyncio.timeout(drain_seconds):
            await drain(drain_seconds)
    except TimeoutError:
        log.warning("drain_incomplete", drain_seconds=drain_seconds)
    except Exception:
        log.exception("drain_failed")
    left_seconds = max(0.5, drain_seconds - (time.monotonic() - started_at))
    await running.stop(min(left_seconds, 5.0))
    log.info("stopped", seconds=round(time.monotonic() - started_at, 3))
