"""The loop within one process: reads the inputs, trains, writes the result."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from transformers import TrainingArguments

from fusionroute.errors import Reason, TrainingFailed
from fusionroute.router_model import load_checkpoint
from trainer.batches import BatchMaker
from trainer.config import CdpoJob, CdpoLossTable, SftJob, TrainingTable
from trainer.frozen_models import load_experts
from trainer.loop_inputs import LoopInputs
from trainer.loop_log import LoopLog
from trainer.process_group import ProcessGroup
from trainer.router_module import LossSwitches, RouterModule
from trainer.router_trainer import RouterTrainer, first_step_of
from trainer.run_context import RunContext
from trainer.step_plan import StepPlan
from trainer.trained_router import LoopOutcome, write_trained
from trainer.training_state import StateFolder

TRAINED_FOLDER, STATES_FOLDER, INPUTS_FOLDER = "trained", "states", "inputs"


def train_here(folder: Path, inputs: LoopInputs, device: str, context: RunContext) -> LoopOutcome:
    """Trains in this process, one of those of the default process group where there is one.

    Args:
        folder: of the run.
        inputs: what to learn.
        device: a torch device.
        context: asked whether to stop; told about progress by the first process.

    Raises:
        FusionRouteError: naming what went wrong.
        Stopped: the context asked for it.
    """
    config = inputs.config
    arguments = arguments_for(folder, config.training, device)
    group = ProcessGroup()
    states = StateFolder(folder / STATES_FOLDER)
    module = _module(inputs, str(arguments.device))
    maker = _maker(inputs)
    plan = _plan(config, maker, group.world_size)
    arguments.max_steps = plan.num_steps
    first_step = first_step_of(states)
    log = None
    if group.is_first:
        log = LoopLog(
            folder, context.report, plan.num_steps, first_step, tensorboard=config.training.tensorboard
        )
    trainer = RouterTrainer(module, arguments, config, plan, maker, states, log, context.stop, group)
    try:
        if first_step < plan.num_steps:
            trainer.train()
    finally:
        if log is not None:
            log.close()
    trained = trainer.accelerator.unwrap_model(trainer.model_wrapped)
    metrics = {**(log.last if log is not None else {}), "steps": float(plan.num_steps)}
    outcome = LoopOutcome(metrics)
    write_trained(
        folder / TRAINED_FOLDER,
        trained,
        group,
        outcome,
        load_afresh=lambda: _module(inputs, "cpu", switches=False),
    )
    return outcome


def arguments_for(folder: Path, table: TrainingTable, device: str) -> TrainingArguments:
    """Settings of transformers' loop: what it would do besides stepping is switched off."""
    kind = torch.device(device)
    if kind.type == "cuda" and kind.index is not None:
        torch.cuda.set_device(kind)
    arguments = TrainingArguments(
        output_dir=str(folder),
        use_cpu=kind.type == "cpu",
        ddp_backend=_backend(kind),
        ddp_find_unused_parameters=False,
        per_device_train_batch_size=table.batch_rows,
        gradient_accumulation_steps=table.accumulation_steps,
        max_grad_norm=table.max_gradient_norm,
        learning_rate=table.learning_rate,
        seed=table.seed,
        max_steps=1,
        report_to=[],
        save_strategy="no",
        eval_strategy="no",
        logging_strategy="no",
        logging_nan_inf_filter=False,
        disable_tqdm=True,
        remove_unused_columns=False,
    )
    assert arguments.device.type == kind.type, (arguments.device, kind)
    arguments._n_gpu = min(1, arguments.n_gpu)  # never DataParallel: more GPUs mean more processes
    return arguments


def _backend(device: torch.device) -> str | None:
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return None
    return "gloo" if device.type == "cpu" else None


def _module(inputs: LoopInputs, device: str, *, switches: bool = True) -> RouterModule:
    config = inputs.config
    keeps_routing = isinstance(config, CdpoJob) or config.routing == "kept"
    routing = _routing_of(inputs.router) if keeps_routing else None
    module = RouterModule.load(
        inputs.router, len(config.experts), config.training, routing, device, gates=config.gates
    )
    if switches:
        cdpo = config.cdpo if isinstance(config, CdpoJob) else CdpoLossTable()
        needs_experts = inputs.pairs is not None and cdpo.policy == "normalised"
        experts = load_experts(config.experts, device) if needs_experts else ()
        module.switches = LossSwitches(config.sft, cdpo, experts)
    if not _learns_texts(inputs):
        module.freeze_routing()
    return module


def _routing_of(router: str) -> tuple[Tensor, Tensor]:
    heads = load_checkpoint(router).heads
    return heads.routing_weight, heads.routing_bias


def _learns_texts(inputs: LoopInputs) -> bool:
    config = inputs.config
    if inputs.sft is None:
        return False
    return not isinstance(config, CdpoJob) or inputs.pairs is None or config.mixed.sft_rows_per_pair > 0


def _maker(inputs: LoopInputs) -> BatchMaker:
    config = inputs.config
    for name, lesson in (("sft", inputs.sft), ("pairs", inputs.pairs)):
        if lesson is not None and lesson.labels.gold_logprobs.shape[1] != len(config.experts):
            columns = lesson.labels.gold_logprobs.shape[1]
            raise TrainingFailed(
                Reason.LABELS_STALE,
                f"labels of {name} are of {columns} experts, the job has {len(config.experts)}",
            )
    sft = inputs.sft if _learns_texts(inputs) else None
    return BatchMaker(sft, inputs.pairs, len(config.experts), all_targets=config.sft.tokens == "all")


def _plan(config: SftJob | CdpoJob, maker: BatchMaker, world_size: int) -> StepPlan:
    per_pair = config.mixed.sft_rows_per_pair if isinstance(config, CdpoJob) else 0.0
    if len(maker.sft_lengths) + len(maker.pair_lengths) == 0:
        raise TrainingFailed(Reason.DATA_INVALID, "there are neither texts nor pairs to learn from")
    return StepPlan(config.training, maker.sft_lengths, maker.pair_lengths, per_pair, world_size)
