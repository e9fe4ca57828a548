"""TrainerService: the calls about jobs and those about checkpoints."""

from __future__ import annotations

from fusionroute.promotions import PromotionStore
from fusionroute.v1 import trainer_pb2_grpc
from trainer.checkpoint_rpcs import CheckpointRpcs
from trainer.checkpoint_store import CheckpointStore
from trainer.jobs.job_rpcs import JobRpcs
from trainer.jobs.store import JobStore
from trainer.promoter import AskRegistry


class TrainerServicer(JobRpcs, CheckpointRpcs, trainer_pb2_grpc.TrainerServiceServicer):
    """The trainer's API.

    Args:
        jobs: where jobs live.
        checkpoints: what they have published.
        promotions: what routers are told to serve.
        ask_registry: who serves, asked before a promotion.
    """

    def __init__(
        self,
        jobs: JobStore,
        checkpoints: CheckpointStore,
        promotions: PromotionStore,
        ask_registry: AskRegistry,
    ) -> None:
        JobRpcs.__init__(self, jobs, lambda checkpoint_id: checkpoints.get(checkpoint_id).folder)
        CheckpointRpcs.__init__(self, checkpoints, promotions, ask_registry)
