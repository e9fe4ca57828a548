"""Who serves which expert slot, in Redis, for all routers that share it. Entries are leases.

    fr:registry:{namespace}:revision|entries|leases|states|loads|addresses

The revision is raised by every change other than a heartbeat, also by the end of a lease, which is noticed by
whoever looks next. Every operation is one round trip and may be repeated.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any

from redis.asyncio import Redis

from fusionroute.errors import Reason, SessionStateError
from fusionroute.redis_scripts import ScriptRunner, load_script
from fusionroute.v1 import common_pb2, registry_pb2

_KEY_PARTS = ("revision", "entries", "leases", "states", "loads", "addresses")
_TTL_SECONDS = 86_400.0  # longer than any lease; the keys of a registry that nobody uses vanish
_STATES = {
    b"ready": registry_pb2.EXPERT_STATE_READY,
    b"draining": registry_pb2.EXPERT_STATE_DRAINING,
}


@dataclass(frozen=True, slots=True)
class Listing:
    """The living entries at a revision, by slot and then by instance."""

    revision: int
    entries: tuple[registry_pb2.ExpertEntry, ...]


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

    async def register(self, entry: registry_pb2.ExpertEntry) -> int:
        """Enters an instance, or renews it, and grants a lease. Returns the revision after it.

        Another instance at the same address is taken out: an address has one process behind it.

        Args:
            entry: instance id, slot, address and model count.
        """
        told = registry_pb2.ExpertEntry(
            instance_id=entry.instance_id, slot=entry.slot, address=entry.address, model=entry.model
        )
        message = told.SerializeToString(deterministic=True)
        answer = await self._run("register", entry.instance_id, message, entry.address, self._lease_ms)
        return int(answer[1])

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

    async def drain(self, instance_id: str, expected_revision: int) -> int:
        """Lets an instance take no new sessions. Returns the revision after it.

        Raises:
            SessionStateError: REVISION_CONFLICT, the registry has changed since `expected_revision`;
                LEASE_EXPIRED, no such instance lives.
        """
        answer = await self._run("drain", instance_id, expected_revision)
        _reject_expired(instance_id, answer)
        if answer[0] == b"conflict":
            message = f"expected_revision = {expected_revision} is old: the registry is at {int(answer[1])}"
            metadata = {"revision": str(int(answer[1]))}
            raise SessionStateError(Reason.REVISION_CONFLICT, message, metadata=metadata)
        return int(answer[1])

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


def _listing(answer: Sequence[Any]) -> Listing:
    entries = []
    for message, state, load, remaining_ms in answer[2:]:
        entry = registry_pb2.ExpertEntry.FromString(message)
        entry.state = _STATES[state]
        if load:
            entry.load.MergeFromString(load)
        entry.lease_remaining_seconds = int(remaining_ms) / 1000
        entries.append(entry)
    entries.sort(key=lambda entry: (entry.slot, entry.instance_id))
    return Listing(int(answer[1]), tuple(entries))
