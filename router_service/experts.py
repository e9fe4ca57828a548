"""The experts as the router sees them: which instances serve a slot now, and which of them a session asks."""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field

import structlog

from fusionroute import grpc_runtime
from fusionroute.access import ClientAccess
from fusionroute.background import end_task
from fusionroute.errors import FusionRouteError, Reason, Unavailable
from fusionroute.v1 import expert_pb2_grpc, registry_pb2
from router_service import metrics
from router_service.asking import Cache
from router_service.breaker import BreakerState
from router_service.instance_choice import NEW_SESSION, Standing, Wish, can_be_asked, choose
from router_service.instances import SHARED_MEMORY_BYTES, Instance
from router_service.retry_budget import RetryBudget
from router_service.session_text import Text

log = structlog.get_logger(__name__)

REFRESH_SECONDS = 0.5
FASTEST_REFRESH_SECONDS = 0.05
SUSPECT_SECONDS = 1.0
"""An instance that failed is passed over for so long where another one serves its slot."""
KNOCK_LOOK_SECONDS = 0.05
MAX_HOMES = 16_384

_ASKED_BY_NOBODY_NEW = (Standing.VANISHED, Standing.STANDBY)

ListEntries = Callable[[], Awaitable[Sequence[registry_pb2.ExpertEntry]]]


@dataclass(slots=True, eq=False)
class Directory:
    """Who serves which slot, kept fresh from the registry. Use as an asynchronous context manager.

    Attributes:
        list_entries: the registry's living entries.
        max_message_bytes: largest gRPC message.
        lease_seconds: an instance that vanished from the registry without a goodbye is a last resort for so long.
        access: certificates and key to show to experts.
        shared_memory_bytes: size of the memory for rows that is offered to each expert; 0 = none.
        local_sockets: whether messages may go over a socket of their own where memory is shared.
        instances: by instance id, vanished ones included.
    """

    list_entries: ListEntries
    max_message_bytes: int = grpc_runtime.MAX_MESSAGE_BYTES
    lease_seconds: float = 10.0
    access: ClientAccess | None = None
    shared_memory_bytes: int = SHARED_MEMORY_BYTES
    local_sockets: bool = True
    instances: dict[str, Instance] = field(default_factory=dict)
    _budgets: dict[str, RetryBudget] = field(default_factory=dict)
    _down_since: dict[str, float] = field(default_factory=dict)
    _homes: OrderedDict[tuple[str, str], str] = field(default_factory=OrderedDict)
    _revivals: dict[Instance, asyncio.Task[None]] = field(default_factory=dict)
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
            for revival in list(self._revivals.values()):
                await end_task(revival)
            async with AsyncExitStack() as stack:
                for instance in self.instances.values():
                    stack.push_async_callback(instance.close)

    # --- who to ask ------------------------------------------------------------------------------------------------

    def best(self, slot: str) -> Instance | None:
        """The instance that a new session would ask, of those that the registry lists."""
        listed = [each for each in self._of(slot) if each.standing not in _ASKED_BY_NOBODY_NEW]
        return self._chosen(listed, NEW_SESSION) or max(listed, key=lambda each: each.epoch, default=None)

    def choose(self, slot: str, text: Text) -> Instance | None:
        """The instance that a session asks now; None while nobody can be asked."""
        home = text.home(slot)
        if home is not None:
            stays_with = self.instances.get(home.rpartition("@")[0])
            if (
                stays_with is not None
                and stays_with.is_undoubted
                and stays_with.name == home
                and stays_with.epoch >= text.floor(slot)
            ):
                return stays_with
        place = (text.session_id, slot)
        wish = Wish(home, self._homes.get(place), text.cached_length, text.floor(slot))
        chosen = self._chosen(self._of(slot), wish)
        if chosen is not None:
            self._homes[place] = chosen.name
            self._homes.move_to_end(place)
            if len(self._homes) > MAX_HOMES:
                self._homes.popitem(last=False)
        return chosen

    def another(self, slot: str, text: Text, instance: Instance) -> Instance | None:
        """A ready replica of `instance` to ask at the same time."""
        others = [each for each in self._of(slot) if each is not instance and each.is_undoubted]
        wish = Wish(None, None, text.cached_length, max(text.floor(slot), instance.epoch))
        return self._chosen(others, wish)

    async def locate(self, slot: str, text: Text, deadline: float) -> Instance:
        """The instance to ask for a slot, waiting for one until `deadline`.

        Raises:
            Unavailable: EXPERT_UNAVAILABLE, naming the slot.
        """
        while (instance := self.choose(slot, text)) is None:
            self._note_down(slot)
            remaining = deadline - time.monotonic()
            if remaining <= 0:
                raise no_expert(slot, len(self._of(slot)))
            changed = self._changed
            self._wake.set()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(min(remaining, REFRESH_SECONDS)):
                    await changed.wait()
        return instance

    def can_be_asked(self, slot: str, text: Text) -> bool:
        """Whether somebody of a slot can be asked for a session now."""
        now, floor = time.monotonic(), text.floor(slot)
        return any(can_be_asked(each.view(now), floor) for each in self._of(slot))

    def absent_seconds(self, slot: str, text: Text) -> float:
        """For how long nobody of a slot could be asked; 0 while somebody can."""
        if self.can_be_asked(slot, text):
            return 0.0
        since = self._note_down(slot)
        return time.monotonic() - since

    # --- what was found out by asking --------------------------------------------------------------------------------

    def report(self, instance: Instance, error: FusionRouteError, began: float) -> None:
        """Hears that an instance could not be asked by an attempt that began at `began`; looks for another one."""
        if isinstance(error, Unavailable) or instance.breaker.state is not BreakerState.CLOSED:
            instance.suspect_until = time.monotonic() + SUSPECT_SECONDS
        slot = instance.entry.slot
        if not any(each.breaker.state is BreakerState.CLOSED for each in self._of(slot)):
            self._down_since.setdefault(slot, began)
        self._wake.set()

    def seconds_until_retry(self, slot: str) -> float:
        """Takes a retry out of a slot's budget; how long to wait for it. Going to a replica that works takes none."""
        if any(each.is_undoubted for each in self._of(slot)):
            return 0.0
        wait = self._budgets.setdefault(slot, RetryBudget()).take(time.monotonic())
        if wait > 0:
            metrics.RETRY_BUDGET_EXHAUSTED.labels(slot=slot).inc()
        return wait

    def _note_down(self, slot: str) -> float:
        return self._down_since.setdefault(slot, time.monotonic())

    def _breaker_changed(self, instance: Instance) -> None:
        state, slot = instance.breaker.state, instance.entry.slot
        metrics.BREAKER_TRANSITIONS.labels(slot=slot, state=state.value).inc()
        log.info("breaker", slot=slot, address=instance.entry.address, state=state.value)
        if state is BreakerState.CLOSED:
            instance.suspect_until = 0.0
            self._down_since.pop(slot, None)
        if state is BreakerState.OPEN and instance not in self._revivals:
            task = asyncio.create_task(self._revive(instance), name=f"knock {instance.entry.address}")
            self._revivals[instance] = task
            task.add_done_callback(lambda _: self._revivals.pop(instance, None))
        self._announce()

    async def _revive(self, instance: Instance) -> None:
        """Knocks at an open instance, with growing pauses, until it answers or is gone."""
        breaker = instance.breaker
        while breaker.state is BreakerState.OPEN and self.instances.get(_id(instance)) is instance:
            if not breaker.should_knock(time.monotonic()):
                await asyncio.sleep(KNOCK_LOOK_SECONDS)
                continue
            breaker.knock()
            answered_well = False
            try:
                answered_well = await instance.knock()
            finally:
                breaker.answered(time.monotonic(), well=answered_well)
        if breaker.state is BreakerState.HALF_OPEN:
            self._breaker_changed(instance)

    # --- the registry ------------------------------------------------------------------------------------------------

    async def refresh(self) -> None:
        """Takes over the registry's entries."""
        entries = {entry.instance_id: entry for entry in await self.list_entries()}
        await self._drop_gone(entries)
        for name, entry in entries.items():
            known = self.instances.get(name)
            if known is not None and known.entry.address == entry.address:
                known.entry, known.gone_since = entry, None
                continue
            if known is not None:
                await self._drop(name)
            self.instances[name] = self._connected(entry)
            log.info("expert_found", slot=entry.slot, address=entry.address, epoch=entry.model.epoch)
        for slot in list(self._down_since):
            if any(each.is_undoubted for each in self._of(slot)):
                del self._down_since[slot]
        self._announce()

    async def _drop_gone(self, entries: dict[str, registry_pb2.ExpertEntry]) -> None:
        """Drops who has left; who vanished without a goodbye is kept for a while, the registry may have forgotten."""
        now = time.monotonic()
        addresses = {entry.address for entry in entries.values()}
        for name in self.instances.keys() - entries.keys():
            gone = self.instances[name]
            if gone.gone_since is None:
                log.info("expert_gone", slot=gone.entry.slot, address=gone.entry.address, instance=name)
                gone.gone_since = now
            has_left = gone.entry.state != registry_pb2.EXPERT_STATE_READY
            is_replaced = gone.entry.address in addresses
            if has_left or is_replaced or now - gone.gone_since > self.lease_seconds:
                await self._drop(name)

    async def _drop(self, name: str) -> None:
        await self.instances.pop(name).close()

    def _connected(self, entry: registry_pb2.ExpertEntry) -> Instance:
        channel = grpc_runtime.channel(
            entry.address, max_message_bytes=self.max_message_bytes, access=self.access
        )
        stub = expert_pb2_grpc.ExpertServiceStub(channel)
        return Instance(
            entry,
            channel,
            stub,
            on_breaker=self._breaker_changed,
            memory_bytes=self.shared_memory_bytes,
            has_socket=self.local_sockets,
        )

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

    def _of(self, slot: str) -> list[Instance]:
        return [each for each in self.instances.values() if each.entry.slot == slot]

    @staticmethod
    def _chosen(instances: Sequence[Instance], wish: Wish) -> Instance | None:
        now = time.monotonic()
        by_view = {each.view(now): each for each in instances}
        chosen = choose(by_view, wish, random.random)
        return None if chosen is None else by_view[chosen]

    def _announce(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()


@dataclass(frozen=True, slots=True)
class RemoteExpert:
    """A slot of the checkpoint, whoever serves it."""

    directory: Directory
    slot: str

    async def locate(self, text: Text, deadline: float) -> Cache:
        """The instance that serves the slot for this session now."""
        return await self.directory.locate(self.slot, text, deadline)

    def another(self, text: Text, cache: Cache) -> Cache | None:
        """A replica."""
        assert isinstance(cache, Instance)
        return self.directory.another(self.slot, text, cache)

    def can_be_asked(self, text: Text) -> bool:
        """Whether any instance can be asked now."""
        return self.directory.can_be_asked(self.slot, text)

    def absent_seconds(self, text: Text) -> float:
        """For how long none could be asked."""
        return self.directory.absent_seconds(self.slot, text)

    def report(self, cache: Cache, error: FusionRouteError, began: float) -> None:
        """Hears that an instance could not be asked."""
        assert isinstance(cache, Instance)
        self.directory.report(cache, error, began)

    def seconds_until_retry(self) -> float:
        """Takes a retry out of the slot's budget."""
        return self.directory.seconds_until_retry(self.slot)


def no_expert(slot: str, num_instances: int) -> Unavailable:
    """Nobody serves a slot, or none of its instances works."""
    silent = f"; of {num_instances} known instances none can be asked" if num_instances else ""
    return Unavailable(
        Reason.EXPERT_UNAVAILABLE,
        f"no expert serves slot {slot!r}{silent}",
        metadata={"slot": slot},
        retry_after_seconds=REFRESH_SECONDS,
    )


def _id(instance: Instance) -> str:
    return instance.entry.instance_id
