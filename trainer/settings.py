"""Settings of the trainer service."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

from pydantic import Field, SecretStr, model_validator

from fusionroute.settings import DaemonSettings, Port, Positive, Seconds


class TrainerSettings(DaemonSettings):
    """Training jobs and the checkpoints they publish, behind one port."""

    table: ClassVar[str] = "trainer"
    other_variables: ClassVar[Mapping[str, str]] = {"REDIS_URL": "redis_url"}

    port: Port = Field(50070, description="Port to listen on; 0 = any free one.")
    redis_url: SecretStr | None = Field(
        None,
        description="Redis for jobs and promotions, the same as the routers'; also REDIS_URL. "
        "Absent = a private server is started, which no router knows.",
    )
    jobs_dir: Path = Field(
        Path("jobs"), description="Each job keeps log, metrics, states and report in a folder of it."
    )
    checkpoints_dir: Path = Field(
        Path("checkpoints"),
        description="Where finished checkpoints are published; best on the file system of jobs_dir.",
    )
    router: str = Field(
        "127.0.0.1:50050",
        description="Router, HOST:PORT, whose registry says which experts serve when a checkpoint is promoted.",
    )
    max_running_jobs: Positive = Field(1, description="Jobs that run at a time; the others wait.")
    job_lease_seconds: Seconds = Field(
        15.0,
        description="A trainer that is silent for so long loses its jobs to another, or to its successor.",
    )
    job_heartbeat_seconds: Seconds = Field(
        2.0, description="How often a job's lease is renewed and its progress told."
    )
    job_stop_seconds: Seconds = Field(
        120.0,
        description="How long a job may take to save when it is cancelled or left alone; then it is killed.",
    )
    job_retry_seconds: Seconds = Field(
        5.0, description="Wait before a job whose process died is tried again; doubles each time."
    )
    job_max_deaths: Positive = Field(3, description="A job whose processes died so often has failed.")
    drain_seconds: Seconds = Field(
        60.0, description="Time for running jobs to save after SIGTERM; they go on with the next trainer."
    )

    @model_validator(mode="after")
    def _heartbeats_are_shorter_than_leases(self) -> TrainerSettings:
        if 2 * self.job_heartbeat_seconds > self.job_lease_seconds:
            limit = f"at most half of job_lease_seconds = {self.job_lease_seconds:g}"
            raise ValueError(f"job_heartbeat_seconds = {self.job_heartbeat_seconds:g} is too long: {limit}")
        return self
