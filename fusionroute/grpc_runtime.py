"""How every service runs on gRPC: server with honest health, channel, rich errors, and an orderly stop."""

from __future__ import annotations

import random
import socket
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import grpc
import structlog
from grpc_health.v1 import health, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from fusionroute.access import ClientAccess, ServerAccess
from fusionroute.access_channel import AccessChannel
from fusionroute.access_check import AccessInterceptor
from fusionroute.daemon import serve_until_signalled, write_ready_file
from fusionroute.health import Progress, ProgressWatch, ServerHealth, WhyNotReady
from fusionroute.rpc_context import ContextInterceptor
from fusionroute.rpc_errors import ErrorInterceptor, error_from_rpc

__all__ = [
    "MAX_MESSAGE_BYTES",
    "ErrorInterceptor",
    "PortTaken",
    "Progress",
    "ProgressWatch",
    "RunningServer",
    "Service",
    "backoff_seconds",
    "channel",
    "check_port_free",
    "error_from_rpc",
    "serve_until_signalled",
    "server",
    "write_ready_file",
]

MAX_MESSAGE_BYTES = 64 * 2**20
KEEPALIVE_SECONDS = 20.0
KEEPALIVE_TIMEOUT_SECONDS = 10.0
MAX_CONNECTION_AGE_SECONDS = 600.0
MAX_CONCURRENT_STREAMS = 1024
HANDSHAKE_TIMEOUT_SECONDS = 10.0

log = structlog.get_logger(__name__)


class PortTaken(Exception):
    """The address cannot be bound; the message names it."""


def _nothing() -> None:
    """All calls of the service end by themselves."""


@dataclass(frozen=True, slots=True)
class Service:
    """A servicer to serve.

    Attributes:
        name: its full protobuf name.
        register: adds it to a server.
        on_stop: hears that the server takes no further calls; to end those that would never end by themselves.
    """

    name: str
    register: Callable[[grpc.aio.Server], None]
    on_stop: Callable[[], None] = _nothing


def _message_options(max_message_bytes: int) -> list[tuple[str, Any]]:
    return [
        ("grpc.max_send_message_length", max_message_bytes),
        ("grpc.max_receive_message_length", max_message_bytes),
    ]


def channel(
    address: str, *, max_message_bytes: int = MAX_MESSAGE_BYTES, access: ClientAccess | None = None
) -> grpc.aio.Channel:
    """A channel, to be used as an async context manager.

    Args:
        address: host:port.
        max_message_bytes: as on the server.
        access: certificates and key to show; None = a plain connection that shows nothing.
    """
    options = [
        *_message_options(max_message_bytes),
        ("grpc.keepalive_time_ms", int(KEEPALIVE_SECONDS * 1000)),
        ("grpc.keepalive_timeout_ms", int(KEEPALIVE_TIMEOUT_SECONDS * 1000)),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.max_pings_without_data", 0),
        # We retry ourselves, knowing which calls are idempotent.
        ("grpc.enable_retries", 0),
        ("grpc.enable_http_proxy", 0),
        # Each channel has its own connection, so a restarted peer is found again at our pace.
        ("grpc.use_local_subchannel_pool", 1),
        ("grpc.initial_reconnect_backoff_ms", 100),
        ("grpc.min_reconnect_backoff_ms", 1000),
        ("grpc.max_reconnect_backoff_ms", 2000),
    ]

    def connect() -> grpc.aio.Channel:
        credentials = access.credentials() if access is not None else None
        if credentials is None:
            return grpc.aio.insecure_channel(address, options=options)
        return grpc.aio.secure_channel(address, credentials, options=options)

    if access is None or not (access.is_encrypted or access.shows_key):
        return connect()
    return AccessChannel(connect, access)


def backoff_seconds(attempt: int, *, first: float = 0.2, most: float = 10.0) -> float:
    """Wait after failed try `attempt` (from 0): doubles from `first` up to `most`, half of it jitter."""
    full: float = min(most, first * 2.0 ** min(attempt, 30))
    return full * random.uniform(0.5, 1.0)  # noqa: S311 - jitter, not a secret


class RunningServer:
    """A server that serves; `address` is host:port with the port that was bound."""

    def __init__(
        self,
        grpc_server: grpc.aio.Server,
        host: str,
        port: int,
        server_health: ServerHealth,
        services: Sequence[Service] = (),
    ) -> None:
        self.host = host
        self.port = port
        self.health = server_health
        self._server = grpc_server
        self._services = services

    @property
    def address(self) -> str:
        """host:port, IPv6 hosts in brackets."""
        return _join_address(self.host, self.port)

    async def begin_drain(self) -> None:
        """Health says NOT_SERVING from now on; calls are still taken."""
        await self.health.begin_drain()

    async def stop(self, grace_seconds: float) -> None:
        """Takes no further calls and gives the running ones `grace_seconds`."""
        await self.begin_drain()
        for service in self._services:
            service.on_stop()
        await self._server.stop(grace_seconds)


@asynccontextmanager
async def server(
    services: Sequence[Service],
    *,
    host: str = "127.0.0.1",
    port: int = 0,
    progress: Callable[[], Progress] | None = None,
    why_not_ready: WhyNotReady | None = None,
    frozen_after_seconds: float = 120.0,
    access: ServerAccess | None = None,
    max_message_bytes: int = MAX_MESSAGE_BYTES,
    max_connection_age_seconds: float = MAX_CONNECTION_AGE_SECONDS,
    stop_grace_seconds: float = 2.0,
) -> AsyncIterator[RunningServer]:
    """Serves within the context: the services, health (grpc.health.v1) and reflection.

    Args:
        services: what to serve.
        host: address to listen on.
        port: 0 = any free one; `RunningServer.port` has the real one.
        progress: the pulse behind health; None = healthy while the event loop runs.
        why_not_ready: what the services lack to be given work; None = nothing, ever.
        frozen_after_seconds: pending work without a tick for so long turns health to NOT_SERVING.
        access: certificate of the server and what clients must show; None = plain and open to all who reach it.
        max_message_bytes: both directions; the same on the clients.
        max_connection_age_seconds: clients are asked to connect anew after so long, to find new replicas.
        stop_grace_seconds: for running calls when the context ends.

    Raises:
        PortTaken: naming the address.
    """
    keys = access.keys if access is not None else None
    checks = [AccessInterceptor(keys)] if keys is not None else []
    grpc_server = grpc.aio.server(
        interceptors=[*checks, ContextInterceptor(), ErrorInterceptor()],
        options=_server_options(max_message_bytes, max_connection_age_seconds),
    )
    names = [service.name for service in services]
    server_health = ServerHealth(names, progress, why_not_ready, frozen_after_seconds)
    health_pb2_grpc.add_HealthServicer_to_server(server_health.servicer, grpc_server)
    for service in services:
        service.register(grpc_server)
    reflection.enable_server_reflection([*names, health.SERVICE_NAME, reflection.SERVICE_NAME], grpc_server)
    bound_port = _bind(grpc_server, host, port, access.credentials() if access is not None else None)
    running = RunningServer(grpc_server, host, bound_port, server_health, services)
    async with server_health.watched():
        await grpc_server.start()
        try:
            yield running
        finally:
            await running.stop(stop_grace_seconds)


def _server_options(max_message_bytes: int, max_connection_age_seconds: float) -> list[tuple[str, Any]]:
    return [
        *_message_options(max_message_bytes),
        # Else a second daemon binds the same port without complaint and takes half of the calls.
        ("grpc.so_reuseport", 0),
        # Clients ping every KEEPALIVE_SECONDS, also during a long prefill and while idle.
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.min_recv_ping_interval_without_data_ms", int(KEEPALIVE_SECONDS * 1000 / 2)),
        ("grpc.http2.max_ping_strikes", 0),
        ("grpc.keepalive_time_ms", int(KEEPALIVE_SECONDS * 3 * 1000)),
        ("grpc.keepalive_timeout_ms", int(KEEPALIVE_TIMEOUT_SECONDS * 1000)),
        ("grpc.max_connection_age_ms", int(max_connection_age_seconds * 1000)),
        # Further calls of a connection wait at the client.
        ("grpc.max_concurrent_streams", MAX_CONCURRENT_STREAMS),
        ("grpc.server_handshake_timeout_ms", int(HANDSHAKE_TIMEOUT_SECONDS * 1000)),
    ]


def _join_address(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _bind(
    grpc_server: grpc.aio.Server, host: str, port: int, credentials: grpc.ServerCredentials | None
) -> int:
    address = _join_address(host, port)
    try:
        if credentials is None:
            bound_port = grpc_server.add_insecure_port(address)
        else:
            bound_port = grpc_server.add_secure_port(address, credentials)
    except RuntimeError as error:
        raise PortTaken(f"cannot listen on {address}: is the port taken by another process?") from error
    if bound_port == 0:
        raise PortTaken(f"cannot listen on {address}: is the port taken by another process?")
    return bound_port


def check_port_free(host: str, port: int) -> None:
    """Finds out in time, before a model is loaded for minutes, that an address cannot be bound.

    Raises:
        PortTaken: naming the address.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        # As gRPC does it: connections of an earlier process that linger are no hindrance.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host.strip("[]"), port))
        except OSError as error:
            address = _join_address(host, port)
            raise PortTaken(f"cannot listen on {address}: {error.strerror or error}") from error
