"""TrainerService: the calls about jobs and those about checkpoints."""

from __future__ import annotations

from fusionroute.v1 import trainer_pb2_grpc
from trainer.jobs.job_rpcs import JobRpcs
from trainer.jobs.store import JobStore


class TrainerServicer(JobRpcs, trainer_pb2_grpc.TrainerServiceServicer):
    """The trainer's API.

    Args:
        jobs: where jobs live.
    """

    def __init__(self, jobs: JobStore) -> None:
        JobRpcs.__init__(self, jobs)
