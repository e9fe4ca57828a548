"""Worker processes that train stages: spawned, one thread of torch each, gone when their parent is gone.

Parent and worker talk JSON over a pipe. The pipe also is the worker's lifeline: when the parent dies,
however it dies, the worker's next message finds the pipe closed and it ends.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any

from trainer.lab_family.recipe import Recipe

SILENCE_LIMIT_SECONDS = 600.0
STOP_SECONDS = 5.0

StepReport = Callable[[str, int, float], None]


class WorkerFailed(RuntimeError):
    """A stage failed or its worker died; the message holds the worker's traceback, if it sent one."""


@dataclass(frozen=True, slots=True)
class Job:
    """One stage to be run by a worker."""

    stage: str
    recipe: Recipe
    seed: int
    folder: Path

    def to_bytes(self) -> bytes:
        """The job as a message."""
        values = {
            "stage": self.stage,
            "recipe": self.recipe.to_json(),
            "seed": self.seed,
            "folder": str(self.folder),
        }
        return json.dumps(values).encode()

    @classmethod
    def from_bytes(cls, message: bytes) -> Job:
        """The job of a message."""
        values = json.loads(message)
        return cls(
            values["stage"], Recipe.from_json(values["recipe"]), values["seed"], Path(values["folder"])
        )


@dataclass(slots=True)
class _Worker:
    process: SpawnProcess
    connection: Connection
    job: Job | None = None


class WorkerPool:
    """Runs groups of jobs on a fixed number of workers."""

    def __init__(self, workers: Sequence[_Worker]) -> None:
        self._workers = list(workers)

    def run(self, jobs: Sequence[Job], report: StepReport) -> dict[str, dict[str, Any]]:
        """Run independent jobs, as many at once as there are workers.

        Returns:
            Facts of every job by its stage.

        Raises:
            WorkerFailed: a job failed, its worker died, or a worker said nothing for ten minutes.
        """
        waiting, facts = list(jobs), dict[str, dict[str, Any]]()
        while len(facts) < len(jobs):
            for worker in self._workers:
                if worker.job is None and waiting:
                    worker.job = waiting.pop(0)
                    worker.connection.send_bytes(worker.job.to_bytes())
            for worker in self._talking():
                message = _received(worker)
                if message["kind"] == "step":
                    report(message["stage"], message["step"], message["loss"])
                elif message["kind"] == "failed":
                    raise WorkerFailed(f"stage {_stage(worker)} failed:\n{message['traceback']}")
                else:
                    facts[_stage(worker)] = message["facts"]
                    worker.job = None
        return facts

    def _talking(self) -> list[_Worker]:
        busy = {worker.connection: worker for worker in self._workers if worker.job is not None}
        ready = wait(list(busy), timeout=SILENCE_LIMIT_SECONDS)
        if not ready:
            stages = ", ".join(_stage(worker) for worker in busy.values())
            raise WorkerFailed(f"no sign of life for {SILENCE_LIMIT_SECONDS:.0f} s from stage {stages}")
        return [busy[connection] for connection in ready if isinstance(connection, Connection)]


@contextmanager
def worker_pool(num_workers: int) -> Iterator[WorkerPool]:
    """Spawned workers, all gone at the end of the block."""
    context = multiprocessing.get_context("spawn")
    workers: list[_Worker] = []
    try:
        for index in range(num_workers):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs,), name=f"lab-worker-{index}", daemon=True)
            process.start()
            theirs.close()
            workers.append(_Worker(process, ours))
        yield WorkerPool(workers)
    finally:
        _stop(workers)


def _stop(workers: Sequence[_Worker]) -> None:
    for worker in workers:
        worker.connection.close()
        worker.process.terminate()
    deadline = time.monotonic() + STOP_SECONDS
    for worker in workers:
        worker.process.join(max(0.0, deadline - time.monotonic()))
        if worker.process.exitcode is None:
            worker.process.kill()
            worker.process.join()
        worker.process.close()


def _received(worker: _Worker) -> dict[str, Any]:
    try:
        message: dict[str, Any] = json.loads(worker.connection.recv_bytes())
    except (EOFError, ConnectionError) as error:
        worker.process.join(STOP_SECONDS)
        raise WorkerFailed(
            f"the worker of stage {_stage(worker)} died with exit code {worker.process.exitcode}"
        ) from error
    return message


def _stage(worker: _Worker) -> str:
    return worker.job.stage if worker.job is not None else "none"


def _serve(connection: Connection) -> None:
    """Main function of a worker: run the jobs that come, until the pipe closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle; it stops us
    _prepare_torch()
    try:
        while True:
            _run(Job.from_bytes(connection.recv_bytes()), connection)
    except (EOFError, ConnectionError):
        return


def _run(job: Job, connection: Connection) -> None:
    from trainer.lab_family import stages

    def send(**message: Any) -> None:
        connection.send_bytes(json.dumps(message).encode())

    def report(stage: str, step: int, loss: float) -> None:
        send(kind="step", stage=stage, step=step, loss=loss)

    try:
        facts = stages.run(job.stage, job.recipe, job.seed, job.folder, report)
    except ConnectionError:
        raise
    except Exception:
        import traceback

        send(kind="failed", traceback=traceback.format_exc())
        return
    send(kind="done", facts=facts)


def _prepare_torch() -> None:
    """One thread, deterministic algorithms: the same seeds give the same bytes."""
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "HF_HUB_OFFLINE"):
        os.environ[name] = "1"
    import torch
    from transformers.utils import logging

    from fusionroute.telemetry import configure_logs

    configure_logs("lab", log_format="console", log_level="error")
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    # filling fresh memory guards against bugs, at the cost of a tenth of the time
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    logging.disable_progress_bar()
    logging.set_verbosity_error()
