"""The calls of TrainerService about checkpoints: messages to the store and the promoter and back."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from fusionroute.promotions import PromotionStore
from fusionroute.v1 import trainer_pb2
from trainer.checkpoint_store import CheckpointStore, PublishedCheckpoint
from trainer.promoter import AskRegistry, Promoter

if TYPE_CHECKING:
    import grpc

    Context = grpc.aio.ServicerContext[Any, Any]

DEFAULT_LIMIT = 100
MOST_CHECKPOINTS = 1000


class CheckpointRpcs:
    """ListCheckpoints, GetCheckpoint, PromoteCheckpoint, RollbackCheckpoint; a part of the trainer's servicer.

    Args:
        store: published checkpoints.
        promotions: what routers are told to serve.
        ask_registry: who serves; see `trainer.promoter.registry_of`.
    """

    def __init__(self, store: CheckpointStore, promotions: PromotionStore, ask_registry: AskRegistry) -> None:
        self._checkpoints = store
        self._promotions = promotions
        self._promoter = Promoter(store, promotions, ask_registry)

    async def ListCheckpoints(  # noqa: N802 - the name in the contract
        self, request: trainer_pb2.ListCheckpointsRequest, context: Context
    ) -> trainer_pb2.ListCheckpointsResponse:
        """The newest ones first."""
        promotion = await self._promotions.read()
        found = await asyncio.to_thread(
            self._checkpoints.list, min(request.limit or DEFAULT_LIMIT, MOST_CHECKPOINTS)
        )
        current = promotion.current.checkpoint_id
        return trainer_pb2.ListCheckpointsResponse(
            checkpoints=[_message(each, current) for each in found], revision=promotion.revision
        )

    async def GetCheckpoint(  # noqa: N802
        self, request: trainer_pb2.GetCheckpointRequest, context: Context
    ) -> trainer_pb2.GetCheckpointResponse:
        """One of them."""
        found = await asyncio.to_thread(self._checkpoints.get, request.checkpoint_id)
        current = (await self._promotions.read()).current.checkpoint_id
        return trainer_pb2.GetCheckpointResponse(checkpoint=_message(found, current))

    async def PromoteCheckpoint(  # noqa: N802
        self, request: trainer_pb2.PromoteCheckpointRequest, context: Context
    ) -> trainer_pb2.PromoteCheckpointResponse:
        """Tells routers to serve a checkpoint."""
        promotion = await self._promoter.promote(request.checkpoint_id, request.expected_revision)
        return trainer_pb2.PromoteCheckpointResponse(revision=promotion.revision)

    async def RollbackCheckpoint(  # noqa: N802
        self, request: trainer_pb2.RollbackCheckpointRequest, context: Context
    ) -> trainer_pb2.RollbackCheckpointResponse:
        """Tells routers to serve what they served before."""
        promotion, checkpoint = await self._promoter.rollback(request.expected_revision)
        response = trainer_pb2.RollbackCheckpointResponse(revision=promotion.revision)
        if checkpoint is not None:
            response.checkpoint.CopyFrom(_message(checkpoint, checkpoint.checkpoint_id))
        return response


def _message(checkpoint: PublishedCheckpoint, promoted_id: str) -> trainer_pb2.Checkpoint:
    return trainer_pb2.Checkpoint(
        checkpoint_id=checkpoint.checkpoint_id,
        job_id=checkpoint.job_id,
        fingerprint=checkpoint.fingerprint,
        manifest=checkpoint.manifest,
        promoted=checkpoint.checkpoint_id == promoted_id,
        created_at_seconds=checkpoint.created_at_seconds,
        folder=str(checkpoint.folder),
    )
