"""registry.proto over the registry store: checks what comes in, decides nothing but admission."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Callable
from typing import Any, TypeAlias

import grpc

from fusionroute.errors import invalid
from fusionroute.v1 import common_pb2, registry_pb2, registry_pb2_grpc
from router_service.registry_store import MIGRATE, Policy, RegistryStore

Admit: TypeAlias = Callable[[str, common_pb2.ModelIdentity], None]
"""Slot and model; raises UNKNOWN_SLOT or VOCABULARY_MISMATCH when the model cannot fill the slot."""

Context: TypeAlias = grpc.aio.ServicerContext[Any, Any]

MAX_SWAPPED = 64
MAX_ADDRESS_CHARACTERS = 300
_MODEL_CHARACTERS = {
    "name": 1024,
    "weights_fingerprint": 128,
    "tokenizer_fingerprint": 128,
    "family": 64,
}

_INSTANCE_ID = re.compile(r"[A-Za-z0-9_.:@-]{1,128}")
_SLOT = re.compile(r"[a-z0-9_-]{1,32}")
_ADDRESS = re.compile(r"(\[[0-9A-Fa-f:.%]+\]|[A-Za-z0-9_.-]+):([0-9]{1,5})")


class RegistryServicer(registry_pb2_grpc.RegistryServiceServicer):
    """Serves the registry.

    Args:
        store: where entries live.
        admit: whether a model may fill a slot.
        poll_seconds: how soon watchers learn of a change.
    """

    def __init__(self, store: RegistryStore, admit: Admit, *, poll_seconds: float = 0.5) -> None:
        self._store = store
        self._admit = admit
        self._poll_seconds = poll_seconds

    async def RegisterExpert(  # noqa: N802 - the name in the contract
        self, request: registry_pb2.RegisterExpertRequest, context: Context
    ) -> registry_pb2.RegisterExpertResponse:
        """Admits and enters an instance."""
        _check_instance_id(request.instance_id)
        _check_slot(request.slot)
        _check_address(request.address)
        if not request.HasField("model"):
            raise invalid("model", None, "the identity of the model must be given")
        _check_model(request.model)
        self._admit(request.slot, request.model)
        entry = registry_pb2.ExpertEntry(
            instance_id=request.instance_id, slot=request.slot, address=request.address, model=request.model
        )
        registered = await self._store.register(entry, standby=request.standby)
        return registry_pb2.RegisterExpertResponse(
            lease_seconds=self._store.lease_seconds,
            revision=registered.revision,
            state=registered.state,
            epoch=registered.epoch,
        )

    async def Heartbeat(  # noqa: N802
        self, request: registry_pb2.HeartbeatRequest, context: Context
    ) -> registry_pb2.HeartbeatResponse:
        """Renews an instance's lease."""
        _check_instance_id(request.instance_id)
        state = await self._store.heartbeat(request.instance_id, request.load, draining=request.draining)
        return registry_pb2.HeartbeatResponse(lease_seconds=self._store.lease_seconds, state=state)

    async def DeregisterExpert(  # noqa: N802
        self, request: registry_pb2.DeregisterExpertRequest, context: Context
    ) -> registry_pb2.DeregisterExpertResponse:
        """Takes an instance out."""
        _check_instance_id(request.instance_id)
        existed = await self._store.deregister(request.instance_id)
        return registry_pb2.DeregisterExpertResponse(existed=existed)

    async def ListExperts(  # noqa: N802
        self, request: registry_pb2.ListExpertsRequest, context: Context
    ) -> registry_pb2.ListExpertsResponse:
        """The living entries."""
        listing = await self._store.list()
        return registry_pb2.ListExpertsResponse(experts=listing.entries, revision=listing.revision)

    async def WatchExperts(  # noqa: N802
        self, request: registry_pb2.WatchExpertsRequest, context: Context
    ) -> AsyncIterator[registry_pb2.WatchExpertsResponse]:
        """The living entries now and after every change."""
        async for listing in self._store.watch(poll_seconds=self._poll_seconds):
            yield registry_pb2.WatchExpertsResponse(experts=listing.entries, revision=listing.revision)

    async def DrainExpert(  # noqa: N802
        self, request: registry_pb2.DrainExpertRequest, context: Context
    ) -> registry_pb2.DrainExpertResponse:
        """Lets an instance be asked no longer than the policy says."""
        _check_instance_id(request.instance_id)
        revision = await self._store.drain(
            request.instance_id, request.expected_revision, _policy(request.policy)
        )
        return registry_pb2.DrainExpertResponse(revision=revision)

    async def SwapExperts(  # noqa: N802
        self, request: registry_pb2.SwapExpertsRequest, context: Context
    ) -> registry_pb2.SwapExpertsResponse:
        """Lets other instances serve a slot."""
        _check_slot(request.slot)
        if not 1 <= len(request.instance_ids) <= MAX_SWAPPED:
            raise invalid(
                "instance_ids", f"{len(request.instance_ids)} instances", f"1 to {MAX_SWAPPED} instances"
            )
        for instance_id in request.instance_ids:
            _check_instance_id(instance_id)
        done = await self._store.swap(
            request.slot, request.instance_ids, request.expected_revision, _policy(request.policy)
        )
        return registry_pb2.SwapExpertsResponse(
            revision=done.revision, epoch=done.epoch, retired_instance_ids=done.instance_ids
        )

    async def RollbackSwap(  # noqa: N802
        self, request: registry_pb2.RollbackSwapRequest, context: Context
    ) -> registry_pb2.RollbackSwapResponse:
        """Lets those serve again that the latest swap has retired."""
        _check_slot(request.slot)
        done = await self._store.roll_back(request.slot, request.expected_revision, _policy(request.policy))
        return registry_pb2.RollbackSwapResponse(
            revision=done.revision, epoch=done.epoch, instance_ids=done.instance_ids
        )


def _policy(policy: Policy) -> Policy:
    if policy not in registry_pb2.DrainPolicy.values():
        raise invalid("policy", policy, "one of DrainPolicy")
    return policy or MIGRATE


def _check_instance_id(instance_id: str) -> None:
    if not _INSTANCE_ID.fullmatch(instance_id):
        raise invalid("instance_id", instance_id, "1 to 128 letters, digits or any of _ . : @ -")


def _check_slot(slot: str) -> None:
    if not _SLOT.fullmatch(slot):
        raise invalid("slot", slot, "1 to 32 of a-z, 0-9, _ and -")


def _check_model(model: common_pb2.ModelIdentity) -> None:
    for field, most in _MODEL_CHARACTERS.items():
        value: str = getattr(model, field)
        if len(value) > most:
            raise invalid(f"model.{field}", value, f"at most {most} characters")


def _check_address(address: str) -> None:
    found = _ADDRESS.fullmatch(address)
    if found is None or len(address) > MAX_ADDRESS_CHARACTERS or not 1 <= int(found[2]) <= 65_535:
        raise invalid("address", address, "host:port with a port from 1 to 65535, IPv6 hosts in brackets")
