"""One of several processes of a training loop: `python -m trainer.loop_process FOLDER`.

Started by trainer.loop_children, or by torchrun, `accelerate launch` and the like, on one machine or several that share
the folder. The parent reads `progress.jsonl`, asks for the end by the file `stop`, and finds a failure in
`failure.json`.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
import traceback
from dataclasses import asdict
from pathlib import Path

from trainer.run_context import RunContext, RunProgress, Stop, Stopped

RENDEZVOUS_VARIABLE = "FUSIONROUTE_RENDEZVOUS_FILE"
"""Where the processes of one machine meet, so that none has to listen for the others to find it."""

PROCESSES_FOLDER = "processes"
PROGRESS_FILE, STOP_FILE, FAILURE_FILE = "progress.jsonl", "stop", "failure.json"
STOPPED_EXIT_CODE = 3
WATCH_SECONDS = 0.2


def main(folder: Path) -> int:
    """Trains; returns the exit code: 0 done, 3 stopped, 1 failed."""
    meeting = folder / PROCESSES_FOLDER
    stop = Stop()
    signal.signal(signal.SIGTERM, lambda *_: stop.request())
    signal.signal(
        signal.SIGINT, signal.SIG_IGN
    )  # a terminal sends it to parent and children; the parent decides
    threading.Thread(target=_watch, args=(meeting, stop, os.getppid()), daemon=True).start()
    from fusionroute.errors import FusionRouteError

    _quiet_libraries()
    try:
        _train(folder, meeting, stop)
        _part()
    except Stopped:
        return STOPPED_EXIT_CODE
    except FusionRouteError as error:
        _write_failure(meeting, error)
        return 1
    except Exception:
        traceback.print_exc()
        return 1
    return 0


def _quiet_libraries() -> None:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from transformers.utils.logging import disable_progress_bar, set_verbosity_error

    disable_progress_bar()
    set_verbosity_error()


def _train(folder: Path, meeting: Path, stop: Stop) -> None:
    from trainer.devices import device_of
    from trainer.loop_inputs import LoopInputs
    from trainer.loop_run import INPUTS_FOLDER, train_here
    from trainer.training_state import storage_errors

    inputs = LoopInputs.load(folder / INPUTS_FOLDER)
    device = _local_device(device_of(inputs.config.training.device))
    _join(device)
    context = RunContext(folder, _Reporter(meeting / PROGRESS_FILE), stop)
    with storage_errors(folder):
        train_here(folder, inputs, device, context)


def _local_device(device: str) -> str:
    """Each process of a machine has an accelerator of its own."""
    kind = device.partition(":")[0]
    return kind if kind == "cpu" else f"{kind}:{os.environ.get('LOCAL_RANK', '0')}"


def _join(device: str) -> None:
    """Meets the other processes; where a launcher has set addresses, transformers does it."""
    import torch
    from torch import distributed

    from trainer.process_group import TIMEOUT

    if device != "cpu":
        torch.accelerator.set_device_index(int(device.partition(":")[2]))
    path = os.environ.get(RENDEZVOUS_VARIABLE)
    if path is None:
        return
    world_size = int(os.environ["WORLD_SIZE"])
    distributed.init_process_group(
        "gloo" if device == "cpu" else distributed.get_default_backend_for_device(device),
        store=distributed.FileStore(path, world_size),  # type: ignore[attr-defined]  # torch
        rank=int(os.environ["RANK"]),
        world_size=world_size,
        timeout=TIMEOUT,
    )


def _part() -> None:
    """Leaves the other processes in order; on any other way out the end of this one is noticed."""
    from torch import distributed

    if distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()


def _watch(meeting: Path, stop: Stop, parent: int) -> None:
    """Asks for the end when the file says so, or when the parent is gone."""
    while not stop.requested:
        if os.getppid() != parent or (meeting / STOP_FILE).exists():
            stop.request()
        time.sleep(WATCH_SECONDS)


class _Reporter:
    """Appends progress as lines of JSON."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __call__(self, progress: RunProgress) -> None:
        with self._path.open("a", encoding="utf-8") as lines:
            lines.write(json.dumps(asdict(progress)) + "\n")


def _write_failure(meeting: Path, error: object) -> None:
    """The first process that fails says why; the others fail because of it."""
    from fusionroute.errors import FusionRouteError

    assert isinstance(error, FusionRouteError)
    print(f"{error.reason.value}: {error.message}", file=sys.stderr)
    content = {"class": type(error).__name__, "reason": error.reason.value, "message": error.message}
    staged = meeting / f".{FAILURE_FILE}-{os.getpid()}"
    staged.write_text(json.dumps({**content, "metadata": error.metadata}), encoding="utf-8")
    try:
        os.link(staged, meeting / FAILURE_FILE)  # whole or not at all, and never over another's
    except FileExistsError:
        pass
    finally:
        staged.unlink()


if __name__ == "__main__":
    exit_code = main(Path(sys.argv[1]))
    sys.stdout.flush()
    sys.stderr.flush()
    # Not by way of the interpreter's end, where threads of libraries can still abort a process whose work is done.
    os._exit(exit_code)
