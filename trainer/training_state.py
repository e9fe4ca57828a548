"""States that a run can go on from: everything or nothing.

states/
    step-200/
        rank-0.safetensors     parameters (and AdamW's two moments of each) and generators of this process
        state.json             step, scheduler, which tensors there must be
        COMPLETE               written last
    .step-400-staged/          not yet one

Under DDP all processes hold the same parameters and process 0 alone writes them; under FSDP each writes its own shards.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from fusionroute.errors import Reason, TrainingFailed

COMPLETE_FILE = "COMPLETE"
STATE_FILE = "state.json"
STATE_FORMAT = 1
KEPT_STATES = 2
_NAME = re.compile(r"step-(\d+)")
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_FULL_WORDS = tuple(f"os error {number}" for number in _FULL)


@dataclass(frozen=True, slots=True)
class SavedStep:
    """The JSON of a state.

    Attributes:
        step: optimiser steps taken.
        world_size: processes that wrote it.
        scheduler: of the learning rate, as its `state_dict`.
    """

    step: int
    world_size: int
    scheduler: dict[str, Any]

    def to_json(self) -> str:
        """The text of state.json."""
        content = {
            "format": STATE_FORMAT,
            "step": self.step,
            "world_size": self.world_size,
            "scheduler": self.scheduler,
        }
        return json.dumps(content) + "\n"

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Of a complete state.

        Raises:
            TrainingFailed: STATE_BROKEN.
        """
        try:
            content = json.loads((folder / STATE_FILE).read_text(encoding="utf-8"))
            if content["format"] != STATE_FORMAT:
                raise ValueError(f"format {content['format']}, this version reads {STATE_FORMAT}")
            return cls(int(content["step"]), int(content["world_size"]), dict(content["scheduler"]))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise broken(folder, f"{STATE_FILE}: {type(error).__name__}: {error}") from error


class StateFolder:
    """The states of one run.

    Args:
        folder: ``<run>/states``.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def newest(self) -> Path | None:
        """The complete state with the most steps, or None."""
        complete = self._complete()
        return complete[-1] if complete else None

    def staged(self, step: int) -> Path:
        """Where the state of a step is written before it is whole."""
        return self.folder / f".step-{step}-staged"

    def begin(self, step: int) -> None:
        """Makes an empty place for a state; done by one process."""
        shutil.rmtree(self.staged(step), ignore_errors=True)
        self.staged(step).mkdir(parents=True)

    def publish(self, saved: SavedStep) -> Path:
        """Makes a staged state, to which every process has written its file, the newest; done by one process."""
        staged, target = self.staged(saved.step), self.folder / f"step-{saved.step}"
        (staged / STATE_FILE).write_text(saved.to_json(), encoding="utf-8")
        shutil.rmtree(target, ignore_errors=True)
        publish(staged, target)
        for old in self._complete()[:-KEPT_STATES]:
            shutil.rmtree(old, ignore_errors=True)
        return target

    def _complete(self) -> list[Path]:
        if not self.folder.is_dir():
            return []
        found = [path for path in self.folder.iterdir() if _NAME.fullmatch(path.name)]
        complete = [path for path in found if (path / COMPLETE_FILE).is_file()]
        return sorted(complete, key=lambda path: int(path.name.removeprefix("step-")))


def rank_file(rank: int) -> str:
    """Name of what one process writes."""
    return f"rank-{rank}.safetensors"


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Writes tensors of any device; no two may share memory."""
    from safetensors.torch import save_file

    save_file({name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()}, path)


def read_tensors(
    folder: Path, rank: int, expected: Mapping[str, tuple[int, ...] | None]
) -> dict[str, Tensor]:
    """What a process wrote, on the CPU: all expected tensors and no others.

    Args:
        folder: of a complete state.
        rank: of the process.
        expected: names with shapes; None = any shape.

    Raises:
        TrainingFailed: STATE_BROKEN, naming the first tensors that are missing, unknown or of another shape.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors = load_file(folder / rank_file(rank))
    except (OSError, SafetensorError) as error:
        raise broken(folder, f"{rank_file(rank)}: {error}") from error
    for fault, names in (("lacks", expected.keys() - tensors), ("has unknown", tensors.keys() - expected)):
        if names:
            raise broken(folder, f"{rank_file(rank)} {fault} {', '.join(sorted(names)[:5])}")
    for name, shape in expected.items():
        if shape is not None and tuple(tensors[name].shape) != shape:
            raise broken(folder, f"{name} has shape {tuple(tensors[name].shape)}, expected {shape}")
    return tensors


def publish(staged: Path, target: Path) -> None:
    """Syncs a staged folder to disk, marks it COMPLETE and gives it its name, which must be free."""
    for path in staged.rglob("*"):
        if path.is_file():
            path.chmod(0o644)  # safetensors writes 0600, which a container's other user could not read
            sync(path)
    (staged / COMPLETE_FILE).touch()
    sync(staged)
    staged.rename(target)
    sync(target.parent)


def sync(path: Path) -> None:
    """Waits until a file or folder is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def broken(folder: Path, why: str) -> TrainingFailed:
    """A STATE_BROKEN error that says how to get past it."""
    return TrainingFailed(
        Reason.STATE_BROKEN,
        f"training state {folder} cannot be continued from: {why}; delete it to go on without it",
    )


@contextmanager
def storage_errors(folder: Path) -> Iterator[None]:
    """Raises TrainingFailed (STORAGE_FULL), naming the folder, where a write failed for want of room."""
    from safetensors import SafetensorError

    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise _full(folder, error) from error
        raise
    except SafetensorError as error:
        if any(words in str(error) for words in _FULL_WORDS):
            raise _full(folder, error) from error
        raise


def _full(folder: Path, error: Exception) -> TrainingFailed:
    return TrainingFailed(Reason.STORAGE_FULL, f"no room to write {folder}: {error}")


def generators() -> dict[str, Tensor]:
    """States of torch's generators of this process (python's and numpy's take no part in training)."""
    states = {"generator/cpu": torch.random.get_rng_state()}
    if torch.cuda.is_available():
        states["generator/cuda"] = torch.cuda.random.get_rng_state()
    return states


def set_generators(states: Mapping[str, Tensor]) -> None:
    """Puts back what `generators` gave."""
    torch.random.set_rng_state(states["generator/cpu"])
    if "generator/cuda" in states:
        torch.cuda.random.set_rng_state(states["generator/cuda"])
