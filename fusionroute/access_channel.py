"""A channel that shows a key with each call and takes up new certificates without a restart."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

import grpc

from fusionroute.access import ClientAccess
from fusionroute.background import end_task

RETIRE_SECONDS = 600.0
"""So long may calls go on over the connection that was made with earlier certificates."""


class AccessChannel(grpc.aio.Channel):
    """Behaves like the channel that `connect` makes, with what `access` shows on each call.

    gRPC's interceptors could do the same, but put a task around every call; this costs about a microsecond.

    Args:
        connect: makes a channel with the credentials that hold now.
        access: what is shown.
    """

    def __init__(self, connect: Callable[[], grpc.aio.Channel], access: ClientAccess) -> None:
        self._connect = connect
        self.access = access
        self._generation = access.generation()
        self._inner = connect()
        self._retiring: dict[asyncio.Task[None], grpc.aio.Channel] = {}
        self._is_closed = False

    def current(self) -> grpc.aio.Channel:
        """The channel for a new call: a new one, if the certificates have changed."""
        generation = self.access.generation()
        if generation != self._generation and not self._is_closed:
            old, self._inner = self._inner, self._connect()
            self._generation = generation
            task = asyncio.get_running_loop().create_task(old.close(RETIRE_SECONDS), name="retire-channel")
            self._retiring[task] = old
            task.add_done_callback(self._forget)
        return self._inner

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self, grace: float | None = None) -> None:
        """Closes the channel, and those that it has replaced."""
        self._is_closed = True
        for task, old in list(self._retiring.items()):
            await end_task(task)
            await old.close(grace)
        await self._inner.close(grace)

    def _forget(self, task: asyncio.Task[None]) -> None:
        self._retiring.pop(task, None)

    def get_state(self, try_to_connect: bool = False) -> grpc.ChannelConnectivity:
        return self._inner.get_state(try_to_connect)

    async def wait_for_state_change(self, last_observed_state: grpc.ChannelConnectivity) -> None:
        await self._inner.wait_for_state_change(last_observed_state)

    async def channel_ready(self) -> None:
        await self._inner.channel_ready()

    def unary_unary(self, *arguments: Any, **named: Any) -> Any:
        return _Method(self, lambda inner: inner.unary_unary(*arguments, **named))

    def unary_stream(self, *arguments: Any, **named: Any) -> Any:
        return _Method(self, lambda inner: inner.unary_stream(*arguments, **named))

    def stream_unary(self, *arguments: Any, **named: Any) -> Any:
        return _Method(self, lambda inner: inner.stream_unary(*arguments, **named))

    def stream_stream(self, *arguments: Any, **named: Any) -> Any:
        return _Method(self, lambda inner: inner.stream_stream(*arguments, **named))


class _Method:
    """One method, called over whichever channel is the current one."""

    def __init__(self, channel: AccessChannel, make: Callable[[grpc.aio.Channel], Any]) -> None:
        self._channel = channel
        self._make = make
        self._made_for: grpc.aio.Channel | None = None
        self._call: Any = None

    def __call__(self, *arguments: Any, metadata: Any = None, **named: Any) -> Any:
        inner = self._channel.current()
        if inner is not self._made_for:
            self._made_for, self._call = inner, self._make(inner)
        shown = self._channel.access.metadata()
        return self._call(*arguments, metadata=(*(metadata or ()), *shown) if shown else metadata, **named)
