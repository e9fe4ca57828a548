"""transformers' Trainer with our batches, normalisation, schedule, states and metrics.

One optimiser step:

    for each of accumulation_steps micro-batches
        sums of L_LM, L_expert, L_CDPO, L_gate <- RouterModule.forward
        backward of world_size * sum over parts of weight * sum / count over the whole step
    clip, AdamW, schedule
    look: finite? time to log, to save? asked to stop?

DDP and FSDP take the mean of the gradients over processes; hence world_size.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from fusionroute.errors import Reason, TrainingFailed
from trainer.batches import Batch, BatchMaker
from trainer.config import CdpoJob, SftJob, TrainingTable
from trainer.gates_table import GatesTable
from trainer.loop_log import LoopLog
from trainer.loop_statistics import PARTS, named, num_statistics, num_tokens
from trainer.process_group import ProcessGroup
from trainer.resume import Resumable
from trainer.router_module import GATE, ROUTING, RouterModule
from trainer.run_context import Stop, Stopped
from trainer.step_plan import StepPlan
from trainer.training_state import StateFolder

CHECK_EVERY_STEPS = 10
"""How often it is looked whether all was finite; also before each log and each save."""

_NEVER = 1 << 62
_GO_ON, _STOP, _SAVE_AND_STOP = range(3)


@dataclass(frozen=True, slots=True)
class PartWeights:
    """Factors of L_LM, L_expert, L_CDPO and, where a gate learns with the router, L_gate in the loss."""

    lm: float
    expert: float
    cdpo: float
    gate: float | None = None

    @classmethod
    def of(cls, config: SftJob | CdpoJob) -> PartWeights:
        """Phase I: 1, lambda, 0, and that of the gate. Phase II: as `mixed.sft_loss` says, and 1."""
        weight = config.sft.expert_weight
        if isinstance(config, SftJob):
            return cls(1.0, weight, 0.0, config.gates.loss_weight if config.gates.learn_with_router else None)
        match config.mixed.sft_loss:
            case "expert":
                return cls(0.0, weight, 1.0)
            case "scaled_sft":
                return cls(weight, weight * weight, 1.0)
            case "sft":
                return cls(1.0, weight, 1.0)

    def as_tuple(self) -> tuple[float, ...]:
        """In the order of `PARTS`, of which the last may be absent."""
        weights = (self.lm, self.expert, self.cdpo)
        return weights if self.gate is None else (*weights, self.gate)


class Steps:
    """The batches of one process from a step on, `accumulation_steps` for each step."""

    def __init__(self, plan: StepPlan, maker: BatchMaker, rank: int, first_step: int) -> None:
        self._plan, self._maker, self._rank, self._first_step = plan, maker, rank, first_step

    def __len__(self) -> int:
        return self._plan.num_steps * self._plan.table.accumulation_steps

    def __iter__(self) -> Iterator[Batch]:
        for step in range(self._first_step, self._plan.num_steps):
            counts = self._maker.counts(self._plan.items(step))
            for share in self._plan.shares(step)[self._rank :: self._plan.world_size]:
                yield self._maker.batch(share, counts, step + 1)


class RouterTrainer(Trainer):  # type: ignore[misc]  # untyped
    """Trains a `RouterModule`.

    Args:
        module: on the device of `arguments`.
        arguments: see `arguments_for`.
        config: of the job.
        plan, maker: what is learnt when.
        states: where training states are kept.
        log: where metrics go; None in all processes but the first.
        stop: checked after each step.
        group: the processes.
        slots: of the experts.
    """

    def __init__(
        self,
        module: RouterModule,
        arguments: TrainingArguments,
        config: SftJob | CdpoJob,
        plan: StepPlan,
        maker: BatchMaker,
        states: StateFolder,
        log: LoopLog | None,
        stop: Stop,
        group: ProcessGroup,
    ) -> None:
        super().__init__(model=module, args=arguments, callbacks=[_RestoreState(self)])
        self.remove_callback(PrinterCallback)
        self.loss_is_scaled_for_ga = True
        self._module, self._config, self._plan, self._maker = module, config, plan, maker
        self._states, self._log, self._stop, self._group = states, log, stop, group
        self._resume_from = states.newest()
        self._weights = PartWeights.of(config).as_tuple()
        self._slots = list(config.experts)
        self._window = _Window(module.device, len(self._weights), len(self._slots))
        self._looked_at_step = 0

    def get_train_dataloader(self) -> Any:
        """Batches from the step on where the run stands."""
        return Steps(self._plan, self._maker, self._group.rank, first_step_of(self._states))

    def get_batch_samples(
        self, epoch_iterator: Iterator[Batch], num_batches: int, device: torch.device
    ) -> tuple[list[Batch], None]:
        """The micro-batches of a step; each knows the counts of the whole step."""
        return [next(epoch_iterator) for _ in range(num_batches)], None

    def create_optimizer(self, model: nn.Module | None = None) -> Optimizer:
        """AdamW: no decay of vectors, routing head and gate at rates of their own."""
        groups = parameter_groups(self.model if model is None else model, self._config.training, self._config.gates)
        fused = self._module.device.type in ("cpu", "cuda")
        self.optimizer: Optimizer = AdamW(groups, betas=self._config.training.betas, fused=fused)
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Optimizer | None = None) -> LambdaLR:
        """Warm-up and cosine, see `learning_rate_share`."""
        table = self._config.training
        self.lr_scheduler = LambdaLR(
            self.optimizer if optimizer is None else optimizer,
            lambda step: learning_rate_share(step, num_training_steps, table),
        )
        return self.lr_scheduler

    def compute_loss(
        self, model: nn.Module, inputs: Batch, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """This micro-batch's part of the step's loss."""
        sums = model(inputs)
        self._window.add(sums.parts, sums.statistics, inputs.step)
        of = inputs.counts
        counts = (of.targets, of.informative, of.pairs, of.targets)
        factors = [weight / max(1, count) for weight, count in zip(self._weights, counts, strict=False)]
        loss = (sums.parts * sums.parts.new_tensor(factors)).sum() * self._group.world_size
        return (loss, sums) if return_outputs else loss

    def _prepare_inputs(self, inputs: Batch) -> Batch:
        return inputs.to(self.args.device)

    def floating_point_ops(self, inputs: Batch) -> int:
        """Not counted."""
        return 0

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Nothing: metrics are written by `_look`."""

    def restore(self) -> None:
        """Continue from the newest state, if there is one; called when model and optimiser are ready."""
        if self._resume_from is not None:
            self.state.global_step = self._resumable().restore(self._resume_from)

    def _maybe_log_save_evaluate(
        self, tr_loss: Tensor, grad_norm: Any, *_: Any, learning_rate: float | None = None, **__: Any
    ) -> None:
        step = self.state.global_step
        if step == self._looked_at_step:  # called again at the end
            return
        self._looked_at_step = step
        self._window.note_gradient(_plain(grad_norm), step)
        self._look(step, grad_norm, learning_rate)

    def _look(self, step: int, grad_norm: Any, learning_rate: float | None) -> None:
        table, is_last = self._config.training, step == self._plan.num_steps
        wish = self._group.largest(_wish(self._stop))
        saves = not is_last and (wish == _SAVE_AND_STOP or step % table.save_every_steps == 0)
        logs = saves or is_last or step % table.log_every_steps == 0
        if logs or step % CHECK_EVERY_STEPS == 0:
            self._window.check_finite(self._group)
        if logs:
            self._write_metrics(step, float(_plain(grad_norm)), learning_rate)
        elif self._log is not None:
            self._log.advance(step)
        if saves:
            self._resumable().save(self._states, step)
        if wish != _GO_ON and not is_last:
            raise Stopped

    def _write_metrics(self, step: int, grad_norm: float, learning_rate: float | None) -> None:
        parts, statistics = self._window.take(self._group)
        if self._log is None:
            return
        metrics = named(statistics, parts, self._slots)
        of_parts = [metrics.get(f"loss/{part}", 0.0) for part in PARTS[: len(self._weights)]]
        loss = sum(weight * value for weight, value in zip(self._weights, of_parts, strict=True))
        rate = float(learning_rate if learning_rate is not None else self._get_learning_rate())
        metrics = {"loss": loss, **metrics, "gradient_norm": grad_norm, "learning_rate": rate}
        self._log.write(step, metrics, num_tokens(statistics))

    def _resumable(self) -> Resumable:
        module = self.accelerator.unwrap_model(self.model_wrapped)
        return Resumable(module.trainable(), self.optimizer, self.lr_scheduler, self._group)


class _RestoreState(TrainerCallback):  # type: ignore[misc]  # untyped
    """Hooks the restoring of a state into the moment when everything is wrapped and nothing has been computed."""

    def __init__(self, trainer: RouterTrainer) -> None:
        self._trainer = trainer

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self._trainer.restore()


class _Window:
    """What the forwards since the last log have given, on the device until it is asked for."""

    def __init__(self, device: torch.device, num_parts: int, num_experts: int) -> None:
        self._names = (*PARTS[:num_parts], "gradient")
        self._parts = torch.zeros(num_parts, device=device)
        self._statistics = torch.zeros(num_statistics(num_experts), device=device)
        self._bad = torch.full((num_parts + 1,), _NEVER, device=device)

    def add(self, parts: Tensor, statistics: Tensor, step: int) -> None:
        """What one forward gave."""
        parts = parts.detach()
        self._parts += parts
        self._statistics += statistics
        self._note(self._bad[:-1], parts, step)

    def note_gradient(self, grad_norm: Tensor, step: int) -> None:
        """The norm of a step's gradient."""
        self._note(self._bad[-1:], grad_norm.to(self._bad.device).reshape(1), step)

    def check_finite(self, group: ProcessGroup) -> None:
        """Raises TrainingFailed (LOSS_NOT_FINITE), naming first step and part, where something was not finite."""
        first = group.smallest(self._bad).tolist()
        step = min(first)
        if step != _NEVER:
            part = self._names[first.index(step)]
            what = "the gradient" if part == "gradient" else f"loss/{part}"
            raise TrainingFailed(
                Reason.LOSS_NOT_FINITE,
                f"{what} is not finite at step {step}; a lower training.learning_rate may help",
                metadata={"step": str(step), "part": part},
            )

    def take(self, group: ProcessGroup) -> tuple[list[float], list[float]]:
        """Sums over all processes of parts and statistics; the next window begins at zero."""
        both = group.sum(torch.cat([self._parts, self._statistics])).tolist()
        self._parts.zero_()
        self._statistics.zero_()
        return both[: len(self._parts)], both[len(self._parts) :]

    @staticmethod
    def _note(bad: Tensor, values: Tensor, step: int) -> None:
        bad.copy_(torch.where(torch.isfinite(values), bad, bad.clamp(max=step)))


def learning_rate_share(step: int, num_steps: int, table: TrainingTable) -> float:
    """Share of the learning rate after `step` steps: linear warm-up, then a cosine down to the final share."""
    if step < table.warmup_steps:
        return (step + 1) / table.warmup_steps
    done = min(1.0, (step - table.warmup_steps) / max(1, num_steps - table.warmup_steps))
    floor = table.final_learning_rate_share
    return floor + (1.0 - floor) * 0.5 * (1.0 + math.cos(math.pi * done))


def parameter_groups(
    module: nn.Module, table: TrainingTable, gates: GatesTable | None = None
) -> list[dict[str, Any]]:
    """Groups for AdamW: LM and routing head, the matrices of both decayed, and a gate."""
    rates = {
        "": table.learning_rate,
        ROUTING: table.learning_rate * table.head_learning_rate_factor,
        GATE: (gates or GatesTable()).learning_rate,
    }
    groups: dict[tuple[str, bool], list[nn.Parameter]] = {}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            head = next((head for head in (ROUTING, GATE) if name.startswith(head)), "")
            groups.setdefault((head, head != GATE and parameter.dim() > 1), []).append(parameter)
    return [
        {"params": parameters, "lr": rates[head], "weight_decay": table.weight_decay if is_decayed else 0.0}
        for (head, is_decayed), parameters in groups.items()
    ]


def first_step_of(states: StateFolder) -> int:
    """Steps that the newest state has behind it; 0 without one."""
    newest = states.newest()
    return 0 if newest is None else int(newest.name.removeprefix("step-"))


def _wish(stop: Stop) -> int:
    if not stop.requested:
        return _GO_ON
    return _SAVE_AND_STOP if stop.save else _STOP


def _plain(norm: Any) -> Tensor:
    """A gradient norm as a plain scalar tensor; FSDP gives a sharded one."""
    full = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
    return torch.as_tensor(full, dtype=torch.float32).detach()
