"""Promoting checkpoints: whole ones only, and only where the experts they were trained with are served."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field

import structlog

from fusionroute.access import ClientAccess
from fusionroute.client import RouterClient
from fusionroute.errors import AccessDenied, ModelRejected, Reason, Unavailable
from fusionroute.manifest import ExpertRecord, Manifest
from fusionroute.promotions import Promotion, PromotionStore, revision_conflict
from fusionroute.v1.common_pb2 import Dtype
from fusionroute.v1.registry_pb2 import EXPERT_STATE_READY, ExpertEntry
from trainer.checkpoint_store import CheckpointStore, PublishedCheckpoint

log = structlog.get_logger(__name__)

AskRegistry = Callable[[], Awaitable[Sequence[ExpertEntry]]]
"""The experts that serve now; raises Unavailable."""


def registry_of(router: str, access: ClientAccess | None = None) -> AskRegistry:
    """The registry of the router at host:port, to which `access` is shown."""

    async def ask() -> Sequence[ExpertEntry]:
        async with RouterClient.open(router, access) as client:
            try:
                return await client.list_experts()
            except AccessDenied as error:  # it is us who are refused, not who asked us
                message = f"the router {router} does not accept the key of this trainer: {error.message}"
                raise Unavailable(Reason.EXPERT_UNAVAILABLE, message) from error

    return ask


@dataclass(slots=True, eq=False)
class Promoter:
    """Promotes and rolls back.

    Attributes:
        store: what can be promoted.
        promotions: what is.
        ask_registry: who serves.
    """

    store: CheckpointStore
    promotions: PromotionStore
    ask_registry: AskRegistry
    _one_at_a_time: asyncio.Lock = field(default_factory=asyncio.Lock)

    async def promote(self, checkpoint_id: str, expected_revision: int) -> Promotion:
        """Tells the routers to serve a checkpoint, after loading it as they will. Takes as long as that.

        Raises:
            InvalidRequest, SessionStateError: CHECKPOINT_UNKNOWN, REVISION_CONFLICT.
            ModelRejected: the checkpoint is broken; EXPERTS_MISMATCH, naming slot and fingerprints.
            Unavailable: neither registry nor store can be asked.
        """
        checkpoint = await asyncio.to_thread(self.store.get, checkpoint_id)
        async with self._one_at_a_time:
            await self._check_revision(checkpoint_id, expected_revision)
            check_experts(checkpoint_id, Manifest.from_json(checkpoint.manifest), await self.ask_registry())
            fingerprint = await asyncio.to_thread(_fingerprint_as_loaded, checkpoint)
            promotion = await self.promotions.promote(checkpoint_id, fingerprint, expected_revision)
        log.info("promoted", checkpoint_id=checkpoint_id, revision=promotion.revision)
        return promotion

    async def rollback(self, expected_revision: int) -> tuple[Promotion, PublishedCheckpoint | None]:
        """Tells the routers to serve what they were told before; None = each the one of its settings.

        The experts are not looked at: they were when it was promoted, and a way back must not depend on them.

        Raises:
            SessionStateError: NOTHING_TO_ROLL_BACK, REVISION_CONFLICT, CHECKPOINT_UNKNOWN (its folder is gone).
            ModelRejected: the checkpoint is broken.
        """
        async with self._one_at_a_time:
            current = await self.promotions.read()
            target = current.previous[-1].checkpoint_id if current.previous else ""
            if target and current.revision == expected_revision:
                await asyncio.to_thread(self.store.get, target)
            promotion = await self.promotions.rollback(expected_revision)
        back = promotion.current.checkpoint_id
        log.info("rolled_back", checkpoint_id=back, revision=promotion.revision)
        return promotion, await asyncio.to_thread(self.store.get, back) if back else None

    async def _check_revision(self, checkpoint_id: str, expected_revision: int) -> None:
        """Spares the loading where the outcome is known; the store decides again afterwards."""
        seen = await self.promotions.read()
        is_done = seen.current.checkpoint_id == checkpoint_id
        if seen.revision != expected_revision and not is_done:
            raise revision_conflict(expected_revision, seen.revision)


def check_experts(checkpoint_id: str, manifest: Manifest, entries: Sequence[ExpertEntry]) -> None:
    """Returns if the experts of a manifest are those that serve.

    Raises:
        ModelRejected: EXPERTS_MISMATCH, naming the slot and both fingerprints.
    """
    for expert in manifest.experts:
        serving = [
            entry for entry in entries if entry.slot == expert.slot and entry.state == EXPERT_STATE_READY
        ]
        if not serving:
            raise _mismatch(
                expert,
                f"checkpoint {checkpoint_id!r} routes to slot {expert.slot!r}, which no expert serves now: start"
                f" {expert.name!r} (weights {expert.weights_fingerprint}) first",
                "",
            )
        for entry in serving:
            if entry.model.weights_fingerprint != expert.weights_fingerprint:
                raise _mismatch(
                    expert,
                    f"checkpoint {checkpoint_id!r} was trained with {expert.name!r} (weights"
                    f" {expert.weights_fingerprint}) in slot {expert.slot!r}; {entry.address} serves"
                    f" {entry.model.name!r} in {Dtype.Name(entry.model.dtype).removeprefix('DTYPE_').lower()} (weights"
                    f" {entry.model.weights_fingerprint}) there",
                    entry.model.weights_fingerprint,
                )


def _mismatch(expert: ExpertRecord, message: str, served: str) -> ModelRejected:
    metadata = {"slot": expert.slot, "trained_with": expert.weights_fingerprint, "served": served}
    return ModelRejected(Reason.EXPERTS_MISMATCH, message, metadata=metadata)


def _fingerprint_as_loaded(checkpoint: PublishedCheckpoint) -> str:
    from fusionroute.router_loading import (
        load_router,
    )  # imports torch, which a trainer without promotions spares

    fingerprint = load_router(checkpoint.folder).fingerprint
    if checkpoint.fingerprint not in ("", fingerprint):
        raise ModelRejected(
            Reason.MODEL_BROKEN,
            f"checkpoint {checkpoint.checkpoint_id!r} was written with fingerprint {checkpoint.fingerprint}, its"
            f" files have {fingerprint} now",
        )
    return fingerprint
