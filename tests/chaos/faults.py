"""What is done to whom, when it is certain that it hits, and how it is undone."""

from __future__ import annotations

import asyncio
import signal
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

from tests.chaos.load import Stream
from tests.chaos.redis_past import RedisPast
from tests.chaos.stack import ChaosStack, Node

SLOW_FACTOR = 100.0
FLIGHT_TOKENS = 3
"""A generation that has received so many tokens is surely in flight."""


class Component(Enum):
    """Who is hurt."""

    NOBODY = "nobody"
    ROUTER = "router"
    """The one that writes."""
    EXPERT = "expert"
    """The only one of its slot, in use."""
    REPLICA = "replica"
    """One of several of its slot, in use."""
    REDIS = "redis"
    CLIENT = "client"


class Fault(Enum):
    """What is done."""

    NOTHING = "nothing"
    KILL = "kill -9"
    STOP = "SIGSTOP"
    RESTART = "restart"
    SLOW = "slow"
    PARTITION = "partition"
    FLUSH = "FLUSHALL"
    LOST_SECOND = "lost last second"
    AWAY = "away 3x as long"
    DISCONNECT = "disconnect, Resume"
    SWAP = "swapped again and again"


@dataclass(frozen=True, slots=True)
class Cell:
    """One square of the matrix."""

    component: Component
    fault: Fault

    def __str__(self) -> str:
        return f"{self.component.value}/{self.fault.value}"

    @property
    def key(self) -> str:
        """As the command line names it: router/kill, redis/lost_second."""
        return f"{self.component.name}/{self.fault.name}".lower()


_EVERYWHERE = (Fault.KILL, Fault.STOP, Fault.RESTART, Fault.SLOW, Fault.PARTITION)
MATRIX = (
    *(
        Cell(component, fault)
        for component in (Component.ROUTER, Component.EXPERT, Component.REPLICA, Component.REDIS)
        for fault in _EVERYWHERE
    ),
    Cell(Component.REDIS, Fault.AWAY),
    Cell(Component.REDIS, Fault.FLUSH),
    Cell(Component.REDIS, Fault.LOST_SECOND),
    Cell(Component.CLIENT, Fault.DISCONNECT),
)
UNDISTURBED = Cell(Component.NOBODY, Fault.NOTHING)


@dataclass(frozen=True, slots=True)
class Hit:
    """A fault that has struck.

    Attributes:
        victim: who was hurt.
        streams: in flight at that moment and dependent on the victim.
        note: what else is known, for example by how much answers were slowed.
    """

    victim: str
    streams: tuple[Stream, ...]
    note: str = ""


class NoMoment(Exception):
    """The generations have come to their end before the fault would have hit enough of them."""


async def choose_victim(
    stack: ChaosStack,
    cell: Cell,
    streams: Sequence[Stream],
    router: int,
    num_wanted: int,
    timeout_seconds: float,
) -> tuple[Node, tuple[Stream, ...]]:
    """Whom to hurt, and the generations in flight that depend on it, as soon as there are enough of them.

    Args:
        num_wanted: generations that the fault shall hit at least.
        router: number of the router that the clients ask first.

    Raises:
        NoMoment: the load does not reach such a moment.
    """
    deadline = time.monotonic() + timeout_seconds
    while True:
        flying = [s for s in streams if s.is_in_flight and len(s.tokens) >= FLIGHT_TOKENS]
        node, touched = await _depending(stack, cell, flying, router)
        if len(touched) >= num_wanted:
            return node, tuple(touched)
        if time.monotonic() > deadline or all(s.finished is not None or s.failure for s in streams):
            raise NoMoment
        await asyncio.sleep(0.02)


async def _depending(
    stack: ChaosStack, cell: Cell, flying: list[Stream], router: int
) -> tuple[Node, list[Stream]]:
    match cell.component:
        case Component.ROUTER:
            node = stack.routers[router]
            return node, [s for s in flying if s.router == node.front.address]
        case Component.EXPERT:
            counts = Counter(slot for s in flying for slot in s.slots)
            sole = [node for node in stack.experts if stack.settings.replicas[node.slot] == 1]
            node = max(sole, key=lambda n: counts[n.slot])
            return node, [s for s in flying if node.slot in s.slots]
        case Component.REPLICA:
            return await _busiest_replica(stack, flying)
        case _:
            return stack.redis, flying


async def _busiest_replica(stack: ChaosStack, flying: list[Stream]) -> tuple[Node, list[Stream]]:
    best, touched = stack.experts[0], list[Stream]()
    if not flying:
        return best, touched
    for node in stack.experts:
        if stack.settings.replicas[node.slot] > 1:
            cached = {session.session_id for session in await stack.sessions(node)}
            using = [s for s in flying if s.session_id in cached and s.is_in_flight]
            if len(using) > len(touched):
                best, touched = node, using
    return best, touched


async def strike(
    stack: ChaosStack, fault: Fault, victim: Node, pause_seconds: float, past: RedisPast | None = None
) -> str:
    """Hurts the victim, for `pause_seconds` where a fault lasts, and undoes it. Returns a note for the report."""
    process = victim.process

    async def absence() -> None:
        await asyncio.sleep(pause_seconds / 4)  # nothing starts again at once

    match fault:
        case Fault.KILL:
            process.before_start = absence
            process.signal(signal.SIGKILL)
            await process.until_dead(5.0)
        case Fault.STOP:
            process.signal(signal.SIGSTOP)
            await asyncio.sleep(pause_seconds)
            process.signal(signal.SIGCONT)
        case Fault.RESTART:
            process.before_start = absence
            process.signal(signal.SIGTERM)
            await process.until_dead(30.0)
        case Fault.SLOW:
            return await _slow(victim, pause_seconds)
        case Fault.PARTITION | Fault.AWAY:
            for link in victim.links:
                link.cut()
            await asyncio.sleep(pause_seconds if fault is Fault.PARTITION else 3 * pause_seconds)
            for link in victim.links:
                link.heal()
        case Fault.FLUSH:
            async with stack.store() as redis:
                num_keys = await redis.dbsize()
                await redis.flushall()
            return f"{num_keys} keys"
        case Fault.LOST_SECOND:
            assert past is not None, "the past must be kept before it is wanted back"
            return await past.put_back(process)
        case _:
            raise ValueError(fault)
    return ""


async def _slow(victim: Node, pause_seconds: float) -> str:
    """Answers of the victim take 100 times as long as its links usually need, at most half of the fault's time each."""
    delays = [link.slow_down(SLOW_FACTOR, pause_seconds / 2) for link in victim.links]
    slowest = max(range(len(delays)), key=delays.__getitem__)
    factor = delays[slowest] / max(victim.links[slowest].usual_seconds, 0.0005)
    await asyncio.sleep(pause_seconds)
    for link in victim.links:
        link.heal()
    return f"answers {delays[slowest] * 1000:.0f} ms later, {factor:.0f}x"
