"""One job from its configuration to what it makes; the same function for the service and for `--local`."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from trainer.config import CdpoJob, ExtendJob, JobConfig, LabelJob, PairsJob, SftJob

if TYPE_CHECKING:
    from trainer.run_context import RunContext, RunResult


def run(config: JobConfig, context: RunContext) -> RunResult:
    """Do what the job says, within the context's folder; what an earlier attempt left there is continued.

    Raises:
        FusionRouteError: naming what is wrong with configuration, data, models or disk.
        Stopped: the context asked for it; the same call again continues.
    """
    from trainer.training_state import storage_errors

    _quiet_libraries()
    context.folder.mkdir(parents=True, exist_ok=True)
    with storage_errors(context.folder):
        return _runner(config)(config, context)


def _runner(config: JobConfig) -> Callable[[Any, RunContext], RunResult]:
    """Imported when needed: each kind needs other things."""
    match config:
        case SftJob():
            from trainer.phase_one import run_sft

            return run_sft
        case CdpoJob():
            from trainer.phase_two import run_cdpo

            return run_cdpo
        case LabelJob():
            from trainer.labelling import run_label

            return run_label
        case PairsJob():
            from trainer.pairs import collect_pairs

            return collect_pairs
        case ExtendJob():
            from trainer.extend_job import run_extend

            return run_extend
    raise TypeError(f"no job is described by {type(config).__name__}")


def _quiet_libraries() -> None:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from transformers.utils.logging import disable_progress_bar, set_verbosity_error

    disable_progress_bar()
    set_verbosity_error()
