"""What a run must keep to go on as if nothing had happened: parameters, moments, schedule, generators."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from trainer.process_group import ProcessGroup
from trainer.training_state import (
    SavedStep,
    StateFolder,
    broken,
    generators,
    rank_file,
    read_tensors,
    set_generators,
    storage_errors,
    write_tensors,
)

_MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True, slots=True)
class Resumable:
    """A run's moving parts.

    Attributes:
        parameters: those that are trained, by name; under FSDP2 each process holds shards of them.
        optimizer: AdamW over them.
        scheduler: of its learning rates.
        group: the processes.
    """

    parameters: Mapping[str, nn.Parameter]
    optimizer: Optimizer
    scheduler: LambdaLR
    group: ProcessGroup

    def save(self, states: StateFolder, step: int) -> None:
        """Writes the state after `step` optimiser steps. Called by all processes.

        Raises:
            TrainingFailed: STORAGE_FULL.
        """
        with storage_errors(states.folder):
            if self.group.is_first:
                states.begin(step)
            self.group.wait_for_all()
            write_tensors(states.staged(step) / rank_file(self.group.rank), self._tensors())
            self.group.wait_for_all()
            if self.group.is_first:
                states.publish(SavedStep(step, self.group.world_size, self.scheduler.state_dict()))
            self.group.wait_for_all()

    def restore(self, folder: Path) -> int:
        """Puts everything back from a complete state. Called by all processes.

        Returns:
            The steps that were taken.

        Raises:
            TrainingFailed: STATE_BROKEN, naming what does not fit.
        """
        saved = SavedStep.read(folder)
        if saved.world_size != self.group.world_size:
            raise broken(folder, f"{saved.world_size} processes wrote it, {self.group.world_size} read it")
        own: dict[str, tuple[int, ...] | None] = dict.fromkeys(generators())
        shapes = self._shapes()
        if self.group.is_first or self._sharded:
            tensors = read_tensors(folder, self.group.rank, own | shapes)
        else:
            tensors = read_tensors(folder, 0, own | shapes) | read_tensors(folder, self.group.rank, own)
        self._put_back(tensors)
        self._reschedule(folder, saved)
        set_generators(tensors)
        return saved.step

    @property
    def _sharded(self) -> bool:
        return any(hasattr(parameter, "to_local") for parameter in self.parameters.values())

    def _tensors(self) -> dict[str, Tensor]:
        tensors = generators()
        if not (self.group.is_first or self._sharded):
            return tensors
        for name, parameter in self.parameters.items():
            state = self.optimizer.state.get(parameter, {})
            tensors[f"parameter/{name}"] = local(parameter)
            tensors[f"step/{name}"] = torch.as_tensor(state.get("step", 0.0), dtype=torch.float32)
            for moment in _MOMENTS:
                tensors[f"{moment}/{name}"] = local(state.get(moment, torch.zeros_like(parameter)))
        return tensors

    def _shapes(self) -> dict[str, tuple[int, ...] | None]:
        shapes: dict[str, tuple[int, ...] | None] = {}
        for name, parameter in self.parameters.items():
            shapes[f"step/{name}"] = ()
            shapes |= {f"{kind}/{name}": tuple(local(parameter).shape) for kind in ("parameter", *_MOMENTS)}
        return shapes

    @torch.no_grad()
    def _put_back(self, tensors: Mapping[str, Tensor]) -> None:
        for name, parameter in self.parameters.items():
            local(parameter).copy_(tensors[f"parameter/{name}"])
            moments = {moment: torch.zeros_like(parameter, requires_grad=False) for moment in _MOMENTS}
            for moment, value in moments.items():
                local(value).copy_(tensors[f"{moment}/{name}"])
            step = tensors[f"step/{name}"].to(local(parameter).device)
            self.optimizer.state[parameter] = {"step": step, **moments}

    def _reschedule(self, folder: Path, saved: SavedStep) -> None:
        if saved.scheduler.keys() != self.scheduler.state_dict().keys():
            raise broken(folder, f"the scheduler's state has {', '.join(sorted(saved.scheduler))}")
        if saved.scheduler["last_epoch"] != saved.step:
            raise broken(
                folder, f"the scheduler stands at step {saved.scheduler['last_epoch']}, not {saved.step}"
            )
        self.scheduler.load_state_dict(saved.scheduler)
        for group, rate in zip(self.optimizer.param_groups, saved.scheduler["_last_lr"], strict=True):
            group["lr"] = rate


def local(tensor: Tensor) -> Tensor:
    """The part of a tensor that this process holds; all of it unless it is sharded."""
    part: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return part.detach()


def whole(tensor: Tensor) -> Tensor:
    """A sharded tensor put together from all processes, any other as it is. Called by all processes."""
    full: Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return full.detach()
