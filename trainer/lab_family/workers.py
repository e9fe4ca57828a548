"""Worker processes that train stages and variants: spawned, one thread of torch each, gone when their parent is gone.

Parent and worker talk JSON over a pipe. The pipe also is the worker's lifeline: when the parent dies,
however it dies, the worker's next message finds the pipe closed and it ends.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any

from trainer.lab_family.graph import TaskGraph
from trainer.lab_family.recipe import Recipe

SILENCE_LIMIT_SECONDS = 600.0
STOP_SECONDS = 5.0

StepReport = Callable[[str, str, int, float], None]
"""Told (key of the job, name of what is trained, steps taken, loss)."""

Done = Callable[[str, dict[str, Any]], None]
"""Told the key of a job and its facts, before what waits for it begins."""


class WorkerFailed(RuntimeError):
    """A stage failed or its worker died; the message holds the worker's traceback, if it sent one."""


@dataclass(frozen=True, slots=True)
class Job:
    """One stage or variant to be run by a worker.

    Attributes:
        stage: a stage's name, or that of a variant.
        folder: of the family.
        output: of a variant, where it is written; None = a stage, which writes into the family's folder.
        made_from: of a variant that is made from another one, that one's folder.
    """

    stage: str
    recipe: Recipe
    seed: int
    folder: Path
    output: Path | None = None
    made_from: Path | None = None

    def to_bytes(self) -> bytes:
        """The job as a message."""
        values = {
            "stage": self.stage,
            "recipe": self.recipe.to_json(),
            "seed": self.seed,
            "folder": str(self.folder),
            "output": _text(self.output),
            "made_from": _text(self.made_from),
        }
        return json.dumps(values).encode()

    @classmethod
    def from_bytes(cls, message: bytes) -> Job:
        """The job of a message."""
        values = json.loads(message)
        recipe = Recipe.from_json(values["recipe"])
        paths = (None if values[name] is None else Path(values[name]) for name in ("output", "made_from"))
        return cls(values["stage"], recipe, values["seed"], Path(values["folder"]), *paths)


def _text(path: Path | None) -> str | None:
    return None if path is None else str(path)


@dataclass(slots=True)
class _Worker:
    process: SpawnProcess
    connection: Connection
    key: str | None = None


class WorkerPool:
    """Runs jobs that wait for each other on a fixed number of workers."""

    def __init__(self, workers: Sequence[_Worker]) -> None:
        self._workers = list(workers)

    def run(self, graph: TaskGraph, jobs: Mapping[str, Job], report: StepReport, done: Done) -> None:
        """Run all tasks of the graph, as many at once as there are workers.

        Args:
            jobs: by the key of their task.

        Raises:
            WorkerFailed: a job failed, its worker died, or no worker said anything for ten minutes.
        """
        while not graph.is_done:
            self._hand_out(graph, jobs)
            for worker in self._talking():
                assert worker.key is not None
                message = _received(worker)
                if message["kind"] == "step":
                    report(worker.key, message["stage"], message["step"], message["loss"])
                elif message["kind"] == "failed":
                    raise WorkerFailed(f"stage {worker.key} failed:\n{message['traceback']}")
                else:
                    done(worker.key, message["facts"])
                    graph.finish(worker.key)
                    worker.key = None

    def _hand_out(self, graph: TaskGraph, jobs: Mapping[str, Job]) -> None:
        for worker in self._workers:
            if worker.key is None and (key := graph.begin()) is not None:
                worker.key = key
                worker.connection.send_bytes(jobs[key].to_bytes())

    def _talking(self) -> list[_Worker]:
        busy = {worker.connection: worker for worker in self._workers if worker.key is not None}
        ready = wait(list(busy), timeout=SILENCE_LIMIT_SECONDS)
        if not ready:
            stages = ", ".join(str(worker.key) for worker in busy.values())
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
            f"the worker of stage {worker.key} died with exit code {worker.process.exitcode}"
        ) from error
    return message


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
    from trainer.lab_family import stages, variant_stage

    def send(**message: Any) -> None:
        connection.send_bytes(json.dumps(message).encode())

    def report(stage: str, step: int, loss: float) -> None:
        send(kind="step", stage=stage, step=step, loss=loss)

    try:
        if job.output is None:
            facts = stages.run(job.stage, job.recipe, job.seed, job.folder, report)
        else:
            facts = variant_stage.run(
                job.stage, job.recipe, job.seed, job.folder, job.output, job.made_from, report
            )
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
