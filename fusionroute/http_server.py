"""An HTTP server on the event loop of a daemon, for as long as a block lasts."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import structlog

from fusionroute.background import end_task
from fusionroute.grpc_runtime import PortTaken

if TYPE_CHECKING:
    from starlette.types import ASGIApp

STOP_SECONDS = 3.0

log = structlog.get_logger(__name__)


@asynccontextmanager
async def serving_http(
    application: ASGIApp,
    host: str,
    port: int,
    *,
    port_field: str,
    stop_seconds: float = STOP_SECONDS,
    **config: Any,
) -> AsyncIterator[str]:
    """Serves an application within the context; gives HOST:PORT.

    Args:
        host, port: where to listen; 0 = any free port.
        port_field: what errors and log lines call the port.
        stop_seconds: for answers under way, at the end.
        config: further settings of `uvicorn.Config`.

    Raises:
        PortTaken: naming the address.
    """
    import uvicorn

    class Server(uvicorn.Server):
        @contextlib.contextmanager
        def capture_signals(self):  # type: ignore[no-untyped-def]  # signals are the daemon's
            yield

    listener = _bind(host, port, port_field)
    server = Server(
        uvicorn.Config(
            application,
            log_config=None,
            access_log=False,
            lifespan="off",
            ws="none",
            server_header=False,
            timeout_keep_alive=30,
            timeout_graceful_shutdown=max(1, round(stop_seconds) - 2),
            **config,
        )
    )
    serving = asyncio.create_task(server.serve([listener]), name=f"{port_field} server")
    bound_host, bound_port = listener.getsockname()[:2]
    address = f"[{bound_host}]:{bound_port}" if ":" in bound_host else f"{bound_host}:{bound_port}"
    log.info(f"{port_field}_open", address=address)
    try:
        yield address
    finally:
        server.should_exit = True
        await asyncio.wait([serving], timeout=stop_seconds)
        await end_task(serving)
        listener.close()
        if not serving.cancelled() and (error := serving.exception()) is not None:
            log.error(f"{port_field}_server_failed", message=repr(error))


def _bind(host: str, port: int, port_field: str) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # By its protocol asyncio knows that small pieces must be sent at once; else tokens wait 40 ms for each other.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host.strip("[]"), port))
        listener.listen(64)  # whoever comes before the server runs waits for it
    except OSError as error:
        listener.close()
        raise PortTaken(
            f"cannot listen on {host}:{port} ({port_field}): {error.strerror or error}"
        ) from error
    return listener
