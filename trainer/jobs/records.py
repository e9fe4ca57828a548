"""What the store knows of a job, as values.

submitted ──> QUEUED ──claim──> RUNNING ──finish──> SUCCEEDED | FAILED | CANCELLED
                ^  │               │                              │         │
                │  └─cancel──> CANCELLED                          └─────────┴──resume──> QUEUED
                └──release, or the lease ends (counted; too often = FAILED)
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

from trainer.config import JobKind
from trainer.run_context import RunProgress


class JobState(Enum):
    """Where a job stands."""

    QUEUED = "queued"
    """It waits for a worker."""
    RUNNING = "running"
    """A worker has it, or had it when it vanished."""
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def is_ended(self) -> bool:
        """Whether nothing more happens to it unless it is resumed."""
        return self not in (JobState.QUEUED, JobState.RUNNING)


class Cancellation(Enum):
    """What becomes of the unsaved steps of a job that is cancelled."""

    SAVE = "save"
    DISCARD = "discard"


@dataclass(frozen=True, slots=True)
class Job:
    """A job as the store has it. Times are seconds since 1970, None where it has not come to that."""

    job_id: str
    kind: JobKind
    config: str
    """Its configuration, JSON."""
    state: JobState
    reason: str
    """Why it is in that state, for people."""
    progress: RunProgress | None
    checkpoint_id: str
    """What it publishes or has published; empty before that is certain."""
    submitted_at_seconds: float
    started_at_seconds: float | None
    ended_at_seconds: float | None
    num_attempts: int
    num_deaths: int
    """Of its workers, since it was submitted or resumed."""
    cancellation: Cancellation | None
    """Asked for, not yet carried out."""
    folder: str
    revision: int
    """Raised by every change."""


@dataclass(frozen=True, slots=True)
class Lease:
    """The right to work on a job, for as long as `fence` is the job's."""

    job_id: str
    fence: int


@dataclass(frozen=True, slots=True)
class Claim:
    """A job with the right to work on it."""

    lease: Lease
    job: Job


def progress_to_json(progress: RunProgress) -> str:
    """One line of JSON."""
    return json.dumps(
        {
            "stage": progress.stage,
            "step": progress.step,
            "num_steps": progress.num_steps,
            "loss": progress.loss,
            "metrics": dict(progress.metrics),
            "remaining_seconds": progress.remaining_seconds,
            "note": progress.note,
        },
        default=float,  # numbers of numpy and torch
    )


def progress_from_json(text: str) -> RunProgress:
    """The inverse of `progress_to_json`. Raises ValueError or TypeError where it is not that."""
    content = json.loads(text)
    if not isinstance(content, dict):
        raise ValueError(f"not an object: {text[:80]!r}")
    return RunProgress(**content)


def parse_job(job_id: str, pairs: Sequence[bytes]) -> Job:
    """The job whose fields and values, one after the other, a script has answered with."""
    fields = {pairs[i].decode(): pairs[i + 1].decode() for i in range(0, len(pairs), 2)}
    cancel = fields["cancel"]
    return Job(
        job_id=job_id,
        kind=JobKind(fields["kind"]),
        config=fields["config"],
        state=JobState(fields["state"]),
        reason=fields["reason"],
        progress=progress_from_json(fields["progress"]) if "progress" in fields else None,
        checkpoint_id=fields["checkpoint_id"],
        submitted_at_seconds=int(fields["submitted_ms"]) / 1000,
        started_at_seconds=_seconds(fields, "started_ms"),
        ended_at_seconds=_seconds(fields, "ended_ms"),
        num_attempts=int(fields["attempts"]),
        num_deaths=int(fields["deaths"]),
        cancellation=Cancellation(cancel) if cancel else None,
        folder=fields.get("folder", ""),
        revision=int(fields["revision"]),
    )


def _seconds(fields: dict[str, Any], name: str) -> float | None:
    return int(fields[name]) / 1000 if name in fields else None
