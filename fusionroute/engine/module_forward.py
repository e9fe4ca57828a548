"""The forward of any family: transformers' own module, its attention replaced by ours."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from fusionroute.engine.attention import RaggedBatch

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class ModuleForward:
    """A causal LM whose attention is `attention.ragged_attention`.

    Args:
        model: the module.
        width: logits per row.
        keeps_hidden: whether anybody wants the final hidden states.
    """

    def __init__(self, model: PreTrainedModel, width: int, *, keeps_hidden: bool) -> None:
        self._model = model
        self._width = width
        self._final = _FinalHidden()
        if keeps_hidden:
            model.get_output_embeddings().register_forward_pre_hook(self._final.keep)

    can_be_exact = False

    def run(
        self, batch: RaggedBatch, token_ids: Sequence[int], positions: Sequence[int], wanted: Sequence[int]
    ) -> tuple[Tensor, Tensor | None]:
        """Logits [wanted, width] and, if they are kept, final hidden states [wanted, H]."""
        assert not batch.exact, "a module's products depend on how many rows there are"
        device = self._model.device
        logits: Tensor = self._model(
            input_ids=torch.tensor([token_ids], device=device),
            position_ids=torch.tensor([positions], device=device),
            logits_to_keep=torch.tensor(wanted, dtype=torch.long, device=device),
            use_cache=False,
            ragged_batch=batch,
        ).logits
        hidden = self._final.take()
        return logits[0, :, : self._width], None if hidden is None else hidden[0]


class _FinalHidden:
    """What the output embeddings were given last. Apart from the model, which would else never be freed at once."""

    def __init__(self) -> None:
        self._hidden: Tensor | None = None

    def keep(self, _module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self._hidden = inputs[0]

    def take(self) -> Tensor | None:
        hidden, self._hidden = self._hidden, None
        return hidden
