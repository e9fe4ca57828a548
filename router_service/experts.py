"""The experts as the router sees them: which instance serves a slot now, and asking it over gRPC."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field

import grpc
import structlog

from fusionroute import grpc_runtime, wire
from fusionroute.background import end_task
from fusionroute.engine import StepCall
from fusionroute.errors import FusionRouteError, Reason, Unavailable
from fusionroute.v1 import expert_pb2, expert_pb2_grpc, registry_pb2
from router_service.asking import Answer, Cache

log = structlog.get_logger(__name__)

REFRESH_SECONDS = 0.5
FASTEST_REFRESH_SECONDS = 0.05
SUSPECT_SECONDS = 1.0
"""An instance that could not be reached is passed over for so long where another one serves its slot."""
CLOSE_SECONDS = 2.0

ListEntries = Callable[[], Awaitable[Sequence[registry_pb2.ExpertEntry]]]


@dataclass(slots=True, eq=False)
class Instance:
    """One running expert process and the connection to it."""

    entry: registry_pb2.ExpertEntry
    channel: grpc.aio.Channel
    stub: expert_pb2_grpc.ExpertServiceAsyncStub
    suspect_until: float = 0.0

    @property
    def name(self) -> str:
        """Instance and epoch: a restart has another cache."""
        return f"{self.entry.instance_id}@{self.entry.model.epoch}"

    @property
    def is_ready(self) -> bool:
        """Whether it takes new sessions."""
        return self.entry.state == registry_pb2.EXPERT_STATE_READY

    async def step(self, call: StepCall, deadline: float) -> Answer:
        """One step over the wire. Raises FusionRouteError."""
        request = expert_pb2.StepRequest(
            session_id=call.session_id,
            from_position=call.from_position,
            token_ids=call.token_ids,
            num_rows=call.num_rows,
            expected_epoch=self.entry.model.epoch,
            fence=call.fence,
            prefix_digest=call.prefix_digest,
        )
        timeout = max(0.001, deadline - time.monotonic())
        try:
            response = await self.stub.Step(request, timeout=timeout)
        except grpc.aio.AioRpcError as error:
            raise grpc_runtime.error_from_rpc(error, self.entry.address) from error
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is None or task.cancelling():
                raise
            # Closing a channel cancels its calls; to whoever waits for one, the expert has gone.
            raise Unavailable(
                Reason.EXPERT_UNAVAILABLE, f"the connection to {self.entry.address} was closed"
            ) from None
        rows = wire.matrix_to_numpy(response.rows, self.entry.model.logits_width)
        return Answer(
            row=rows[0],
            head_scores=None,
            epoch=response.epoch,
            cache=self.name,
            forward_seconds=response.timings.forward_seconds,
        )

    async def close_session(self, session_id: str, fence: int) -> None:
        """Asks the expert to forget a session; an expert that does not answer will evict it in time."""
        request = expert_pb2.CloseSessionRequest(session_id=session_id, fence=fence)
        with contextlib.suppress(grpc.aio.AioRpcError):
            await self.stub.CloseSession(request, timeout=CLOSE_SECONDS)


@dataclass(slots=True, eq=False)
class Directory:
    """Who serves which slot, kept fresh from the registry. Use as an asynchronous context manager.

    Attributes:
        list_entries: the registry's living entries.
        max_message_bytes: largest gRPC message.
    """

    list_entries: ListEntries
    max_message_bytes: int = grpc_runtime.MAX_MESSAGE_BYTES
    instances: dict[str, Instance] = field(default_factory=dict)
    _wake: asyncio.Event = field(default_factory=asyncio.Event)
    _changed: asyncio.Event = field(default_factory=asyncio.Event)

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[Directory]:
        """Refreshes in the background within the context and closes all connections after it."""
        task = asyncio.create_task(self._keep_fresh(), name="directory")
        try:
            yield self
        finally:
            await end_task(task)
            async with AsyncExitStack() as stack:
                for instance in self.instances.values():
                    stack.push_async_callback(instance.channel.close)

    def best(self, slot: str) -> Instance | None:
        """The instance to ask for a slot: ready before draining, unsuspected first, then the newest epoch."""
        now = time.monotonic()
        serving = [i for i in self.instances.values() if i.entry.slot == slot]
        return max(
            serving, key=lambda i: (i.is_ready, i.suspect_until <= now, i.entry.model.epoch), default=None
        )

    async def locate(self, slot: str, deadline: float) -> Instance:
        """The instance to ask for a slot, waiting for one until `deadline`.

        Raises:
            Unavailable: EXPERT_UNAVAILABLE, naming the slot.
        """
        while (instance := self.best(slot)) is None:
            remaining = deadline - time.monotonic()
            if remaining <= 0:
                raise Unavailable(
                    Reason.EXPERT_UNAVAILABLE,
                    f"no expert serves slot {slot!r}",
                    metadata={"slot": slot},
                    retry_after_seconds=REFRESH_SECONDS,
                )
            changed = self._changed
            self._wake.set()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(min(remaining, REFRESH_SECONDS)):
                    await changed.wait()
        return instance

    def report(self, instance: Instance, error: FusionRouteError) -> None:
        """Hears that an instance could not be asked; looks for another one soon."""
        if isinstance(error, Unavailable):
            instance.suspect_until = time.monotonic() + SUSPECT_SECONDS
        self._wake.set()

    async def refresh(self) -> None:
        """Takes over the registry's entries."""
        entries = {entry.instance_id: entry for entry in await self.list_entries()}
        for name in self.instances.keys() - entries.keys():
            gone = self.instances.pop(name)
            log.info("expert_gone", slot=gone.entry.slot, address=gone.entry.address, instance=name)
            await gone.channel.close()
        for name, entry in entries.items():
            known = self.instances.get(name)
            if known is not None and known.entry.address == entry.address:
                known.entry = entry
                continue
            if known is not None:
                await known.channel.close()
            channel = grpc_runtime.channel(entry.address, max_message_bytes=self.max_message_bytes)
            self.instances[name] = Instance(entry, channel, expert_pb2_grpc.ExpertServiceStub(channel))
            log.info("expert_found", slot=entry.slot, address=entry.address, epoch=entry.model.epoch)
        self._changed.set()
        self._changed = asyncio.Event()

    async def _keep_fresh(self) -> None:
        while True:
            self._wake.clear()
            try:
                await self.refresh()
            except FusionRouteError as error:
                log.warning("registry_unreachable", reason=error.reason.value, message=error.message)
            except Exception:
                log.exception("registry_refresh_failed")  # the next one may succeed; stale entries are worse
            await asyncio.sleep(FASTEST_REFRESH_SECONDS)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(REFRESH_SECONDS):
                    await self._wake.wait()


@dataclass(frozen=True, slots=True)
class RemoteExpert:
    """A slot of the checkpoint, whoever serves it."""

    directory: Directory
    slot: str

    async def locate(self, deadline: float) -> Cache:
        """The instance that serves the slot now."""
        return await self.directory.locate(self.slot, deadline)

    def report(self, cache: Cache, error: FusionRouteError) -> None:
        """Hears that an instance could not be asked."""
        assert isinstance(cache, Instance)
        self.directory.report(cache, error)
