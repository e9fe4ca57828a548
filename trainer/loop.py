"""The training loop from outside: one call that continues what an earlier one left, in this process or in several.

<run>/
    inputs/         what to learn (trainer.loop_inputs)
    states/         to go on from (trainer.training_state)
    metrics.jsonl, tensorboard/
    processes/      logs of child processes, where there are any
    trained/        the result (trainer.trained_router)
"""

from __future__ import annotations

from pathlib import Path

from trainer.config import TrainingTable
from trainer.devices import device_of
from trainer.loop_inputs import LoopInputs
from trainer.loop_run import INPUTS_FOLDER, TRAINED_FOLDER, train_here
from trainer.run_context import RunContext
from trainer.trained_router import LoopOutcome, read_outcome

__all__ = ["LoopOutcome", "train_loop"]


def train_loop(folder: Path, context: RunContext) -> LoopOutcome:
    """Trains what `<folder>/inputs` describes until `<folder>/trained` is complete.

    Args:
        folder: of the run; states of an earlier attempt are continued.
        context: its `stop` is looked at after each step, its `report` is told about progress.

    Raises:
        TrainingFailed: LOSS_NOT_FINITE, STORAGE_FULL, STATE_BROKEN, LABELS_STALE.
        ModelRejected: the router or an expert cannot be loaded.
        InternalFault: a child process ended without a word.
        Stopped: the context asked for it; unless told otherwise a state has been saved.
    """
    if (outcome := read_outcome(folder / TRAINED_FOLDER)) is not None:
        return outcome
    context.stop.check()
    inputs = LoopInputs.load(folder / INPUTS_FOLDER)
    if _runs_here(inputs.config.training):
        return train_here(folder, inputs, device_of(inputs.config.training.device), context)
    from trainer.loop_children import train_in_children

    return train_in_children(folder, inputs.config.training, context)


def _runs_here(table: TrainingTable) -> bool:
    return table.num_processes == 1 and not table.launcher
