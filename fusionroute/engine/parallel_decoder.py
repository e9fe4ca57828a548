"""Our own decoder on one process's part of a model, in place of the module that transformers has split.

    each process: its heads, its share of the mlp  --o, down--> partial sums --all-reduce--> the same rows everywhere
                  its slice of the vocabulary: embeddings are summed likewise, logits are gathered

Two sums a layer, one for the embeddings and one gathering are all that the processes exchange.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import embedding, linear

from fusionroute.engine.attention import RaggedBatch
from fusionroute.engine.decoder import CLASSES, Decoder

if TYPE_CHECKING:
    from transformers import PreTrainedModel


# Newer versions of torch warn of the older name.
_gather: Callable[[Tensor, Tensor], object] = (
    getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
)


def is_part(model: PreTrainedModel) -> bool:
    """Whether this process has only a part of the model."""
    return (getattr(model, "tp_size", None) or 1) > 1


def split_decoder_of(model: PreTrainedModel, width: int) -> SplitDecoder | None:
    """The lean forward of a part; None if the model is of another family.

    The weights are taken out of the module, so that each is in memory once: it cannot run afterwards.
    """
    if type(model).__name__ not in CLASSES:
        return None
    return SplitDecoder(model, width)


class SplitDecoder(Decoder):
    """A part of a causal LM; all processes must run the same forwards in the same order.

    Args:
        model: as transformers has split it; loses its weights.
        width: logits per row.
    """

    can_be_exact = False  # in which order the parts of a sum are added depends on its size
    may_step = False

    def __init__(self, model: PreTrainedModel, width: int) -> None:
        vocabulary = model.get_input_embeddings().weight.shape[0]
        super().__init__(_small_module(model), width)
        self._size = dist.get_world_size()
        self._width = width
        self._slice = -(-vocabulary // self._size)  # of the vocabulary; the last process may have less
        self._offset = dist.get_rank() * self._slice
        self._joined = _summed

    def run(
        self, batch: RaggedBatch, token_ids: Sequence[int], positions: Sequence[int], wanted: Sequence[int]
    ) -> tuple[Tensor, Tensor]:
        """Logits [wanted, width] and final hidden states [wanted, H], the same in every process."""
        logits, hidden = super().run(batch, token_ids, positions, wanted)
        mine = logits.new_zeros((self._slice, logits.shape[0]))
        mine[: logits.shape[1]] = logits.t()
        whole = logits.new_empty((self._size * self._slice, logits.shape[0]))
        _gather(whole, mine)
        return whole[: self._width].t().contiguous(), hidden

    def _embedded(self, token_ids: Tensor) -> Tensor:
        rows = self._embeddings.shape[0]
        mine = token_ids - self._offset
        is_mine = (mine >= 0) & (mine < rows)
        embedded: Tensor = embedding(mine.clamp(0, rows - 1), self._embeddings) * is_mine[:, None]
        dist.all_reduce(embedded)
        return embedded


def _summed(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`linear` of an input whose columns are in several processes, as those of the weight are."""
    total = linear(x, weight)
    dist.all_reduce(total)
    return total if bias is None else total.add_(bias)


def _small_module(model: PreTrainedModel) -> PreTrainedModel:
    """A module of the part's sizes with the part's weights, which are taken out of `model`."""
    size = int(model.tp_size)
    config = copy.deepcopy(model.config)
    config.head_dim = int(model.model.layers[0].self_attn.head_dim)
    for field in ("num_attention_heads", "num_key_value_heads", "intermediate_size"):
        setattr(config, field, getattr(config, field) // size)
    with torch.device("meta"):
        small = type(model)(config)
    small.model.rotary_emb = model.model.rotary_emb
    taken: dict[int, nn.Parameter] = {}  # the embeddings may be the head as well
    for name, parameter in list(model.named_parameters(remove_duplicate=False)):
        if id(parameter) not in taken:
            taken[id(parameter)] = nn.Parameter(_local(parameter), requires_grad=False)
        _put(small, name, taken[id(parameter)])
        _put(model, name, nn.Parameter(taken[id(parameter)].new_empty(0), requires_grad=False))
    return cast("PreTrainedModel", small.eval())


def _local(parameter: Any) -> Tensor:
    """What this process has of a parameter."""
    local: Tensor = parameter.to_local() if hasattr(parameter, "to_local") else parameter
    return local.detach()


def _put(model: nn.Module, name: str, parameter: nn.Parameter) -> None:
    owner, _, leaf = name.rpartition(".")
    model.get_submodule(owner)._parameters[leaf] = parameter
