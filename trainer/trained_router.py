"""What the loop leaves behind: a plain Hugging Face folder of the LM, its tokenizer, and the routing head.

trained/
    config.json, model.safetensors, tokenizer files
    routing_head.safetensors     routing.weight, routing.bias, and of a gate that has learnt with it gate.*
    loop.json                    the loop's outcome
    COMPLETE                     written last
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from fusionroute.router_model import HEAD_FILE, Heads
from trainer.gate_head import with_gate
from trainer.process_group import ProcessGroup
from trainer.resume import whole
from trainer.router_module import GATE, ROUTING, RouterModule
from trainer.training_state import COMPLETE_FILE, publish, storage_errors

if TYPE_CHECKING:
    from transformers import PreTrainedModel

OUTCOME_FILE = "loop.json"


@dataclass(frozen=True, slots=True)
class LoopOutcome:
    """What came of a loop.

    Attributes:
        metrics: of the last logged steps, and the number of steps.
    """

    metrics: Mapping[str, float]


def read_outcome(folder: Path) -> LoopOutcome | None:
    """Of a loop that has ended and left its whole result in `folder`, else None."""
    if not (folder / COMPLETE_FILE).is_file():
        return None
    return LoopOutcome(**json.loads((folder / OUTCOME_FILE).read_text(encoding="utf-8")))


def write_trained(
    folder: Path,
    module: RouterModule,
    group: ProcessGroup,
    outcome: LoopOutcome,
    load_afresh: Callable[[], RouterModule],
) -> None:
    """Writes the result beside `folder` and moves it there. Called by all processes.

    Args:
        folder: ``<run>/trained``.
        module: trained; may be sharded.
        group: the processes.
        outcome: kept with the result.
        load_afresh: the router before training, on the CPU and with its adapters: adapters are merged into it.

    Raises:
        TrainingFailed: STORAGE_FULL.
    """
    has_adapters = hasattr(module.lm, "merge_and_unload")
    names = module.trainable() if has_adapters else _all_weights(module)
    weights = _collected(names, module.stored_dtype, keep=group.is_first, cast=not has_adapters)
    heads = _heads(module)
    if group.is_first:
        staged = folder.with_name(f".{folder.name}-staged")
        shutil.rmtree(staged, ignore_errors=True)
        with storage_errors(folder):
            if has_adapters:
                _merged(load_afresh(), weights).to(module.stored_dtype).save_pretrained(staged)
            else:
                module.lm.save_pretrained(staged, state_dict=weights)
                _declare_dtype(staged, module.stored_dtype)
            module.tokenizer.save_pretrained(staged)
            save_file(heads.tensors(), staged / HEAD_FILE)
            (staged / OUTCOME_FILE).write_text(json.dumps(asdict(outcome)), encoding="utf-8")
            shutil.rmtree(folder, ignore_errors=True)
            publish(staged, folder)
    group.wait_for_all()


def _heads(module: RouterModule) -> Heads:
    """Whole tensors on the CPU. All processes take part."""
    routing = _whole_parameters(module.routing)
    heads = Heads(routing["weight"], routing["bias"])
    return heads if module.gate is None else with_gate(heads, "gate", _whole_parameters(module.gate))


def _whole_parameters(head: nn.Module) -> dict[str, Tensor]:
    return {name: whole(value).cpu().float() for name, value in head.named_parameters()}


def _all_weights(module: RouterModule) -> dict[str, Tensor]:
    """Parameters and stored buffers under the LM's own names; tied ones under each of theirs."""
    stored = module.lm.state_dict().keys()
    named = [
        *module.lm.named_parameters(remove_duplicate=False),
        *module.lm.named_buffers(remove_duplicate=False),
    ]
    return {name: value for name, value in named if name in stored}


def _collected(
    named: Mapping[str, Tensor], dtype: torch.dtype, *, keep: bool, cast: bool
) -> dict[str, Tensor]:
    """Whole tensors on the CPU, one copy of tied ones. All processes take part, those that `keep` get them."""
    copies: dict[int, Tensor] = {}
    for tensor in named.values():
        if id(tensor) not in copies:
            full = whole(tensor)
            wanted = dtype if cast and full.is_floating_point() else full.dtype
            copies[id(tensor)] = full.to("cpu", wanted) if keep else full.new_empty(0)
    return {name: copies[id(tensor)] for name, tensor in named.items()}


@torch.no_grad()
def _merged(fresh: RouterModule, adapters: Mapping[str, Tensor]) -> PreTrainedModel:
    for name, target in fresh.trainable().items():
        if not name.startswith((ROUTING, GATE)):
            target.copy_(adapters[name])
    merged: PreTrainedModel = fresh.lm.merge_and_unload(safe_merge=True)
    return merged


def _declare_dtype(folder: Path, dtype: torch.dtype) -> None:
    """`save_pretrained` writes the dtype that the model was trained in, not that of the weights it is given."""
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["dtype"] = str(dtype).removeprefix("torch.")
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
