"""Who serves which expert slot, in Redis, for all routers that share it. Entries are leases.

    fr:registry:{namespace}:revision|entries|leases|facts|loads|addresses|slots

What was decided about a slot (its epoch, who serves, the latest swap) outlives leases. The revision is raised by every
change other than a heartbeat, also by the end of a lease, which is noticed by whoever looks next. Every operation is
one round trip and may be repeated.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Collection, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn, TypeAlias

from redis.asyncio import Redis

from fusionroute.errors import Reason, SessionStateError, Unavailable, invalid
from fusionroute.redis_scripts import ScriptRunner, load_script
from fusionroute.v1 import common_pb2, registry_pb2

_KEY_PARTS = ("revision", "entries", "leases", "facts", "loads", "addresses", "slots")
_TTL_SECONDS = 86_400.0  # longer than any lease; the keys of a registry that nobody uses vanish
_STATES = {
    b"ready": registry_pb2.EXPERT_STATE_READY,
    b"draining": registry_pb2.EXPERT_STATE_DRAINING,
    b"standby": registry_pb2.EXPERT_STATE_STANDBY,
}

Policy: TypeAlias = registry_pb2.DrainPolicy.ValueType
MIGRATE: Policy = registry_pb2.DRAIN_POLICY_MIGRATE


@dataclass(frozen=True, slots=True)
class Listing:
    """The living entries at a revision, by slot and then by instance."""

    revision: int
    entries: tuple[registry_pb2.ExpertEntry, ...]


@dataclass(frozen=True, slots=True)
class Registered:
    """What a registration has come to.

    Attributes:
        revision: of the registry after it.
        state: what the registry wants the instance to be.
        epoch: of the slot under which it serves; 0 on standby.
    """

    revision: int
    state: registry_pb2.ExpertState.ValueType
    epoch: int


@dataclass(frozen=True, slots=True)
class Decision:
    """What a swap or a rollback has come to.

    Attributes:
        revision: of the registry after it.
        epoch: of the slot from now on.
        instance_ids: a swap's: those that drain now; a rollback's: those that serve again.
    """

    revision: int
    epoch: int
    instance_ids: tuple[str, ...]


class RegistryStore:
    """The registry in one Redis.

    Args:
        client: from `fusionroute.private_redis.connect`.
        lease_seconds: an instance that is silent for so long is out.
        namespace: registries of different names share nothing.
        deadline_seconds: how long an operation may take, repetitions included.

    Every method raises Unavailable (STORE_UNAVAILABLE) when Redis did not answer by then.
    """

    def __init__(
        self,
        client: Redis,
        *,
        lease_seconds: float = 10.0,
        namespace: str = "default",
        deadline_seconds: float = 5.0,
    ) -> None:
        self._runner = ScriptRunner(client, deadline_seconds=deadline_seconds)
        self._keys = [f"fr:registry:{{{namespace}}}:{part}" for part in _KEY_PARTS]
        self.lease_seconds = lease_seconds

    async def register(self, entry: registry_pb2.ExpertEntry, *, standby: bool = False) -> Registered:
        """Enters an instance, or renews it, and grants a lease.

        Another instance at the same address is taken out: an address has one process behind it. An instance that
        was told to drain goes on draining. One with other weights than those that serve the slot takes the slot
        over if they were loaded later than any that the slot's latest decision knew; else it drains.

        Args:
            entry: instance id, slot, address and model count.
            standby: wait for `swap` instead of serving; counts for an instance that is not known yet.
        """
        told = registry_pb2.ExpertEntry(
            instance_id=entry.instance_id, slot=entry.slot, address=entry.address, model=entry.model
        )
        message = told.SerializeToString(deterministic=True)
        model = entry.model
        answer = await self._run(
            "register", entry.instance_id, message, entry.address, self._lease_ms,
            entry.slot, model.weights_fingerprint, model.epoch, int(standby),
        )  # fmt: skip
        return Registered(int(answer[1]), _STATES[answer[2]], int(answer[3]))

    async def heartbeat(
        self, instance_id: str, load: common_pb2.Load, *, draining: bool = False
    ) -> registry_pb2.ExpertState.ValueType:
        """Renews a lease. Returns what the registry wants the instance to be.

        Args:
            draining: the instance is about to stop.

        Raises:
            SessionStateError: LEASE_EXPIRED, register again.
        """
        message = load.SerializeToString(deterministic=True)
        answer = await self._run("heartbeat", instance_id, message, int(draining), self._lease_ms)
        _reject_expired(instance_id, answer)
        return _STATES[answer[1]]

    async def deregister(self, instance_id: str) -> bool:
        """Takes an instance out. Returns whether it was in."""
        answer = await self._run("deregister", instance_id)
        return bool(answer[0] == b"done")

    async def drain(self, instance_id: str, expected_revision: int, policy: Policy = MIGRATE) -> int:
        """Lets an instance be asked no longer than `policy` says. Returns the revision after it.

        The last one that serves a slot may be drained too: until another one is there, it is better than nobody.

        Raises:
            SessionStateError: REVISION_CONFLICT, the registry has changed since `expected_revision`;
                LEASE_EXPIRED, no such instance lives.
            InvalidRequest: the instance is on standby, so that nobody asks it.
        """
        answer = await self._run("drain", instance_id, expected_revision, policy)
        if answer[0] == b"standby":
            raise invalid("instance_id", instance_id, "an instance that serves, not one on standby")
        _reject_expired(instance_id, answer)
        _reject_conflict(expected_revision, answer)
        return int(answer[1])

    async def swap(
        self, slot: str, instance_ids: Collection[str], expected_revision: int, policy: Policy = MIGRATE
    ) -> Decision:
        """Makes living instances of equal weights the ones that serve a slot; the others drain.

        Raises:
            SessionStateError: REVISION_CONFLICT; LEASE_EXPIRED, one of them does not live.
            Unavailable: DRAINING, one of them is about to stop.
            InvalidRequest: one of them is of another slot, or of other weights than the first.
        """
        chosen = sorted(set(instance_ids))
        answer = await self._run("swap", slot, expected_revision, policy, *chosen)
        _reject_conflict(expected_revision, answer)
        if answer[0] != b"done":
            _reject_swap(slot, answer[1].decode(), answer)
        return _decision(answer)

    async def roll_back(self, slot: str, expected_revision: int, policy: Policy = MIGRATE) -> Decision:
        """Makes those that the latest swap of a slot has retired, and that still live, serve it again.

        Raises:
            SessionStateError: REVISION_CONFLICT; NOTHING_TO_ROLL_BACK.
        """
        answer = await self._run("rollback", slot, expected_revision, policy)
        _reject_conflict(expected_revision, answer)
        if answer[0] == b"nothing":
            message = f"slot {slot!r} has no swap whose retired instances still live"
            raise SessionStateError(Reason.NOTHING_TO_ROLL_BACK, message)
        return _decision(answer)

    async def list(self) -> Listing:
        """The living entries."""
        return _listing(await self._run("list", ""))

    async def entries(self) -> Sequence[registry_pb2.ExpertEntry]:
        """The living entries, whatever the revision."""
        return (await self.list()).entries

    async def list_if_changed(self, known_revision: int) -> Listing | None:
        """The living entries, or None while the registry is at `known_revision`."""
        answer = await self._run("list", known_revision)
        return None if answer[0] == b"same" else _listing(answer)

    async def watch(self, *, poll_seconds: float = 0.5) -> AsyncIterator[Listing]:
        """The living entries now and after every change, changes close to each other as one.

        Polls: that notices the end of leases, which nobody announces, and survives a restart of Redis.
        """
        listing = await self.list()
        while True:
            yield listing
            while (changed := await self.list_if_changed(listing.revision)) is None:  # noqa: ASYNC110 - polls
                await asyncio.sleep(poll_seconds)
            listing = changed

    @property
    def _lease_ms(self) -> int:
        return max(round(self.lease_seconds * 1000), 1)

    async def _run(self, verb: str, *arguments: str | bytes | int) -> Sequence[Any]:
        script = load_script("router_service", "registry", f"registry_{verb}")
        ttl_ms = round(max(_TTL_SECONDS, 2 * self.lease_seconds) * 1000)
        return await self._runner.run(script, self._keys, [ttl_ms, *arguments])


def _reject_expired(instance_id: str, answer: Sequence[Any]) -> None:
    if answer[0] == b"expired":
        message = f"instance {instance_id} is not in the registry: never registered, or its lease has ended"
        raise SessionStateError(Reason.LEASE_EXPIRED, message)


def _reject_conflict(expected_revision: int, answer: Sequence[Any]) -> None:
    if answer[0] == b"conflict":
        message = f"expected_revision = {expected_revision} is old: the registry is at {int(answer[1])}"
        raise SessionStateError(Reason.REVISION_CONFLICT, message, metadata={"revision": str(int(answer[1]))})


def _reject_swap(slot: str, instance_id: str, answer: Sequence[Any]) -> NoReturn:
    _reject_expired(instance_id, answer)
    match answer[0]:
        case b"leaving":
            raise Unavailable(Reason.DRAINING, f"instance {instance_id} is about to stop")
        case b"elsewhere":
            raise invalid("instance_ids", instance_id, f"instances of slot {slot!r}")
        case _:
            raise invalid("instance_ids", instance_id, "instances of equal weights")


def _decision(answer: Sequence[Any]) -> Decision:
    return Decision(int(answer[1]), int(answer[2]), tuple(name.decode() for name in answer[3:]))


def _listing(answer: Sequence[Any]) -> Listing:
    entries = []
    for message, state, load, remaining_ms, epoch, policy in answer[2:]:
        entry = registry_pb2.ExpertEntry.FromString(message)
        entry.state = _STATES[state]
        if load:
            entry.load.MergeFromString(load)
        entry.lease_remaining_seconds = int(remaining_ms) / 1000
        entry.epoch = int(epoch)
        entry.drain_policy = registry_pb2.DrainPolicy.ValueType(int(policy))
        entries.append(entry)
    entries.sort(key=lambda entry: (entry.slot, entry.instance_id))
    return Listing(int(answer[1]), tuple(entries))
