"""The models of the family and the one loop that trains each of them."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fusionroute.lab.tokenizer import EOS_ID, MAX_CONTEXT_TOKENS, PAD_ID, VOCABULARY_SIZE
from trainer.lab_family.packing import Packing
from trainer.lab_family.recipe import Recipe, Stage

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

BETAS = (0.9, 0.98)
WEIGHT_DECAY = 0.01
MAX_GRADIENT_NORM = 1.0
FINAL_LEARNING_RATE_SHARE = 0.1
REPORT_EVERY_STEPS = 10

Report = Callable[[int, float], None]
StageReport = Callable[[str, int, float], None]


def seed_torch(name: str) -> None:
    """Seed torch from a name, so that every stage has a stream of its own."""
    torch.manual_seed(zlib.crc32(name.encode()))


def new_model(recipe: Recipe) -> LlamaForCausalLM:
    """A Llama of the recipe's shape with fresh weights from torch's generator."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCABULARY_SIZE,
        hidden_size=recipe.hidden_size,
        intermediate_size=recipe.intermediate_size,
        num_hidden_layers=recipe.num_layers,
        num_attention_heads=recipe.num_heads,
        num_key_value_heads=recipe.num_heads,
        max_position_embeddings=MAX_CONTEXT_TOKENS,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=EOS_ID,
        pad_token_id=PAD_ID,
    )
    return LlamaForCausalLM(config)


def load(folder: str) -> LlamaForCausalLM:
    """A model that an earlier stage has saved."""
    from transformers import LlamaForCausalLM

    return LlamaForCausalLM.from_pretrained(folder, local_files_only=True, dtype=torch.float32)


def hidden_states(model: LlamaForCausalLM, ids: Tensor, packing: Packing | None = None) -> Tensor:
    """Final-norm hidden states.

    Args:
        ids: ``[B, L]``; unpacked rows may be padded on the right, where no real token looks.
        packing: how the ids were packed, if they were.

    Returns:
        ``[B, L, H]``.
    """
    layout = {}
    if packing is not None:
        layout = {"attention_mask": packing.attention_mask(), "position_ids": packing.positions}
    output: Tensor = model.model(input_ids=ids, use_cache=False, **layout).last_hidden_state
    return output


def learning_rate_share(step: int, stage: Stage) -> float:
    """Share of the learning rate at a step: linear warm-up, then a cosine down to a tenth."""
    if step < stage.warmup_steps:
        return (step + 1) / stage.warmup_steps
    done = (step - stage.warmup_steps) / max(1, stage.num_steps - stage.warmup_steps)
    cosine = 0.5 * (1.0 + math.cos(math.pi * done))
    return FINAL_LEARNING_RATE_SHARE + (1.0 - FINAL_LEARNING_RATE_SHARE) * cosine


def train(
    parameter_groups: Sequence[dict[str, Any]],
    stage: Stage,
    loss_at: Callable[[int], Tensor],
    report: Report,
    weight_decay: float = WEIGHT_DECAY,
) -> float:
    """Take the stage's steps on `loss_at(step)`.

    Args:
        parameter_groups: of AdamW; a group without its own ``lr`` has the stage's.
        report: called with (steps taken, loss) now and then, and after the last step.

    Returns:
        The mean loss of the last tenth of the steps.

    Raises:
        FloatingPointError: the loss is not finite.
    """
    optimizer = torch.optim.AdamW(
        parameter_groups, lr=stage.learning_rate, betas=BETAS, weight_decay=weight_decay, fused=True
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate_share(step, stage))
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    losses = torch.zeros(stage.num_steps)
    for step in range(stage.num_steps):
        loss = loss_at(step)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(parameters, MAX_GRADIENT_NORM)
        optimizer.step()
        schedule.step()
        losses[step] = loss.detach()
        if (step + 1) % REPORT_EVERY_STEPS == 0 or step + 1 == stage.num_steps:
            if not torch.isfinite(losses[step]):
                raise FloatingPointError(f"loss is {losses[step].item()} at step {step + 1}")
            report(step + 1, losses[step].item())
    return losses[-max(1, stage.num_steps // 10) :].mean().item()
