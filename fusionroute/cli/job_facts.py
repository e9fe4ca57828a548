"""A job in words and numbers, for `fusionroute jobs`."""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fusionroute.v1.trainer_pb2 import Job


def job_facts(job: Job) -> dict[str, Any]:
    """A job for scripts; times are seconds since 1970, null where it has not come to that."""
    from fusionroute.trainer_client import kind_name, state_name

    progress = job.progress
    return {
        "job_id": job.job_id,
        "kind": kind_name(job.kind),
        "state": state_name(job.state),
        "state_reason": job.state_reason,
        "checkpoint_id": job.checkpoint_id,
        "stage": progress.stage,
        "step": progress.step,
        "num_steps": progress.num_steps,
        "loss": progress.loss if progress.HasField("loss") else None,
        "remaining_seconds": progress.remaining_seconds if progress.HasField("remaining_seconds") else None,
        "metrics": dict(progress.metrics),
        "submitted_at_seconds": job.submitted_at_seconds,
        "started_at_seconds": job.started_at_seconds or None,
        "ended_at_seconds": job.ended_at_seconds or None,
        "num_attempts": job.num_attempts,
        "folder": job.folder,
        "config": json.loads(job.config),
    }


def name_of(job: Job) -> str:
    """What its configuration calls it."""
    return str(json.loads(job.config).get("name", ""))


def doing(job: Job) -> str:
    """What it is at while it runs, else why it is in its state."""
    from fusionroute.v1.trainer_pb2 import JobState

    if job.state != JobState.JOB_STATE_RUNNING or job.state_reason or not job.progress.stage:
        return job.state_reason
    steps = f"/{job.progress.num_steps:,}" if job.progress.num_steps else ""
    return f"{job.progress.stage} {job.progress.step:,}{steps}"


def took(job: Job) -> str:
    """From its first start to its end, or until now."""
    from fusionroute.cli.train_progress import duration_text

    if not job.started_at_seconds:
        return "-"
    return duration_text((job.ended_at_seconds or time.time()) - job.started_at_seconds)


def date_of(seconds: float) -> str:
    """Local time."""
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))
