"""The last linear map of a causal LM, from hidden states to vocabulary rows, used without ever holding them all.

    hidden = final_hidden(model, input_ids)[positions]          [T, H]
    head   = VocabularyHead.of(model, logits_width)
    head.gold_logprobs(hidden, gold, chunk_tokens=1024)         [T], trains the model

T tokens, V vocabulary entries, H numbers of a hidden state; position p predicts token p + 1.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from fusionroute.engine.admission import CHECK_TOLERANCE
from fusionroute.errors import ModelRejected, Reason
from trainer.chunked_rows import BLOCK_NUMBERS, FrozenRows, FusedLogPartition, GoldLogprobs, RowMaker, chunks

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SCALE_SETTINGS = ("logit_scale", "logits_scaling", "lm_head_multiplier", "output_multiplier")
"""Names under which families keep a factor or divisor of their logits; which of both it is, the check finds out."""

DEFAULT_CHUNK_TOKENS = 1024


class LinearMap(Protocol):
    """Where a head's parameters are looked up at each use, so that sharding may exchange them meanwhile."""

    @property
    def weight(self) -> Tensor:
        """``[>= V, H]``."""

    @property
    def bias(self) -> Tensor | None:
        """``[>= V]`` or None."""


@dataclass(frozen=True, slots=True)
class FixedMap:
    """Parameters that are plain tensors."""

    weight: Tensor
    bias: Tensor | None


class RowStatistics(NamedTuple):
    """Of each token: log-probability ``[T]`` of the gold token (float32), first choice ``[T]`` (int64)."""

    gold_logprobs: Tensor
    choices: Tensor


class VocabularyHead:
    """rows = softcap * tanh(scale * (h W^T + b) / softcap), cut to V entries.

    Log-probabilities are float32 (float64 for float64 models). Matrix products are made in the dtype of the autocast
    around the call, else in that of the weights.

    Args:
        weight: ``[V, H]``, or wider with `width`; the live parameter, which gets gradients if it requires them.
        bias: ``[V]`` or None.
        softcap: of the final logits; None = none.
        scale: of the logits before the soft-cap.
        width: V; None = all of the weight.
        block_numbers: numbers that are read at a time where rows are reduced.
    """

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None = None,
        softcap: float | None = None,
        scale: float = 1.0,
        *,
        width: int | None = None,
        block_numbers: int = BLOCK_NUMBERS,
    ) -> None:
        self._map: LinearMap = FixedMap(weight, bias)
        self.width = weight.shape[0] if width is None else width
        self.softcap, self.scale = softcap, scale
        self._block_numbers = block_numbers

    @classmethod
    def of(cls, model: PreTrainedModel, logits_width: int) -> VocabularyHead:
        """The head of a model, checked: on a few tokens its rows equal the model's own logits.

        Args:
            model: a causal LM or one wrapped by peft; runs twice on 16 tokens.
            logits_width: V, at most the rows of the output embedding; the padding beyond is cut off.

        Raises:
            ModelRejected: VOCABULARY_MISMATCH, or MODEL_UNSUPPORTED where logits are not such a function of the final
                hidden state, naming the model.
        """
        output = model.get_output_embeddings()
        if not isinstance(output, nn.Linear):
            raise _unsupported(model, f"its output embedding is {type(output).__name__}, not a linear layer")
        if output.weight.shape[0] < logits_width:
            raise ModelRejected(
                Reason.VOCABULARY_MISMATCH,
                f"{_name(model)!r} has {output.weight.shape[0]} output embeddings, "
                f"the vocabulary has {logits_width} ids",
            )
        softcap, scale = _softcap_and_scale(model, output, logits_width)
        head = cls(output.weight, output.bias, softcap, scale, width=logits_width)
        head._map = output
        return head

    @property
    def weight(self) -> Tensor:
        """The live parameter ``[>= V, H]``."""
        return self._map.weight

    @property
    def bias(self) -> Tensor | None:
        """The live parameter ``[>= V]``, or None."""
        return self._map.bias

    def rows(self, hidden: Tensor) -> Tensor:
        """Rows ``[t, V]`` in float32 of hidden states ``[t, H]``, through plain autograd; for few tokens."""
        maker = self._maker(hidden)
        with torch.autocast(hidden.device.type, enabled=False):
            products = functional.linear(hidden.to(maker.dtype), *maker.cast(self.weight, self.bias))
            rows = products.to(maker.exact_dtype) * self.scale
            return rows if self.softcap is None else torch.tanh(rows / self.softcap) * self.softcap

    def gold_logprobs(self, hidden: Tensor, gold: Tensor, chunk_tokens: int = DEFAULT_CHUNK_TOKENS) -> Tensor:
        """log softmax(row)[gold], differentiable in hidden states and parameters.

        Args:
            hidden: ``[T, H]`` final hidden states of the positions before the gold tokens; T may be 0.
            gold: ``[T]`` token ids below V.
            chunk_tokens: rows that exist at a time, in forward and in backward.

        Returns:
            ``[T]`` float32.
        """
        logprobs: Tensor = GoldLogprobs.apply(  # type: ignore[no-untyped-call]  # torch
            hidden, self.weight, self.bias, gold.long(), self._maker(hidden), chunk_tokens
        )
        return logprobs

    @torch.no_grad()
    def choices(self, hidden: Tensor, chunk_tokens: int = DEFAULT_CHUNK_TOKENS) -> Tensor:
        """The highest entry ``[T]`` (int64) of each row, the first of several equal ones; no gradient."""
        return torch.cat([rows.argmax(dim=1) for _, rows in self._row_blocks(hidden, chunk_tokens)])

    @torch.no_grad()
    def statistics(
        self, hidden: Tensor, gold: Tensor, chunk_tokens: int = DEFAULT_CHUNK_TOKENS
    ) -> RowStatistics:
        """`gold_logprobs` and `choices` from one computation of the rows; no gradient."""
        logprobs, choices = [], []
        for tokens, rows in self._row_blocks(hidden, chunk_tokens):
            choices.append(rows.argmax(dim=1))
            scores = rows.gather(1, gold[tokens].long()[:, None])[:, 0]
            logprobs.append(scores - rows.logsumexp(dim=1))
        return RowStatistics(torch.cat(logprobs), torch.cat(choices))

    def frozen_rows(self, hidden: Tensor) -> FrozenRows:
        """What `fused_log_partition` needs of a frozen expert; in the dtype of its weights whatever the autocast."""
        maker = self._maker_in(self.weight.dtype)
        bias = None if self.bias is None else self.bias.detach()
        return FrozenRows(hidden.detach(), self.weight.detach(), bias, maker)

    def _row_blocks(self, hidden: Tensor, chunk_tokens: int) -> Iterator[tuple[slice, Tensor]]:
        """A few rows at a time, in memory that the next ones will be written to."""
        maker = self._maker(hidden)
        with torch.autocast(hidden.device.type, enabled=False):
            cut, offset = maker.cast(self.weight, self.bias)
            if len(hidden) == 0:
                yield slice(0, 0), hidden.new_empty((0, self.width), dtype=maker.exact_dtype)
            buffer = maker.buffer(hidden, min(len(hidden), chunk_tokens))
            for chunk in chunks(len(hidden), chunk_tokens):
                for block, rows in maker.blocks(maker.products(hidden[chunk], cut, offset, buffer)):
                    yield slice(chunk.start + block.start, chunk.start + block.start + len(rows)), rows

    def _maker(self, hidden: Tensor) -> RowMaker:
        device = hidden.device.type
        autocast = torch.is_autocast_enabled(device)
        return self._maker_in(torch.get_autocast_dtype(device) if autocast else self.weight.dtype)

    def _maker_in(self, dtype: torch.dtype) -> RowMaker:
        return RowMaker(self.width, self.softcap, self.scale, dtype, self._block_numbers)


def fused_log_partition(
    head: VocabularyHead,
    hidden: Tensor,
    expert_heads: Sequence[VocabularyHead],
    expert_hidden: Sequence[Tensor],
    routes: Tensor,
    chunk_tokens: int = DEFAULT_CHUNK_TOKENS,
) -> Tensor:
    """log Z = log sum_v pi_k(v) pi_theta(v): what makes the product of router and routed expert a distribution.

    log softmax(e_k + r)[y] = log pi_theta(y) + log pi_k(y) - log Z.

    Args:
        head, hidden: of the router, ``[T, H]``; the only ones that get gradients.
        expert_heads, expert_hidden: of each expert, ``[T, H_k]``.
        routes: ``[T]`` k, the index of each token's expert.
        chunk_tokens: rows of both together that exist at a time.

    Returns:
        ``[T]`` float32.
    """
    assert all(expert.width == head.width for expert in expert_heads), "experts of another vocabulary"
    experts = [expert.frozen_rows(states) for expert, states in zip(expert_heads, expert_hidden, strict=True)]
    result: Tensor = FusedLogPartition.apply(  # type: ignore[no-untyped-call]  # torch
        hidden, head.weight, head.bias, experts, routes, head._maker(hidden), chunk_tokens
    )
    return result


def final_hidden(
    model: PreTrainedModel,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
) -> Tensor:
    """Hidden states ``[B, L, H]`` after the final norm: what the output embedding gets.

    Rows padded on the right need no mask: attention is causal, so that no token sees the padding after it.

    Raises:
        ModelRejected: MODEL_UNSUPPORTED, the model has no decoder of its own, naming the model.
    """
    decoder = model.get_decoder()
    if decoder is model:
        raise _unsupported(model, "it has no decoder apart from its head")
    output = decoder(
        input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, use_cache=False
    )
    hidden: Tensor = output.last_hidden_state
    return hidden


@torch.no_grad()
def _softcap_and_scale(model: PreTrainedModel, output: nn.Linear, width: int) -> tuple[float | None, float]:
    """Those of the model's settings under which the head's rows equal the model's logits."""
    config = model.config.get_text_config()
    softcaps = {getattr(config, "final_logit_softcapping", None): None, None: None}
    scales = {1.0: None}
    for name in SCALE_SETTINGS:
        value = getattr(config, name, None)
        if isinstance(value, (int, float)) and value > 0:
            scales |= {float(value): None, 1 / float(value): None}
    ids = torch.tensor([[(7 * step + 3) % width for step in range(16)]], device=output.weight.device)
    with _evaluating(model):
        hidden = final_hidden(model, ids)[0]
        wanted = model(input_ids=ids, use_cache=False).logits[0, :, :width].float()
        differences: dict[tuple[float | None, float], float] = {}
        for setting in itertools.product(softcaps, scales):
            got = VocabularyHead(output.weight, output.bias, *setting, width=width).rows(hidden)
            relative = (got - wanted).abs().max() / wanted.abs().max().clamp_min(1e-6)
            differences[setting] = float(relative)
    best = min(differences, key=lambda setting: differences[setting])
    limit = CHECK_TOLERANCE.get(output.weight.dtype, CHECK_TOLERANCE[torch.float32])
    if not differences[best] <= limit:
        raise _unsupported(
            model,
            f"its logits differ from those of its output embedding by {differences[best]:.1e}, limit {limit:.0e}",
        )
    return best


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """In evaluation mode and outside of autocast, then as before."""
    modes: dict[Any, bool] = {module: module.training for module in model.modules()}
    device = next(model.parameters()).device.type
    model.eval()
    try:
        with torch.autocast(device, enabled=False):
            yield
    finally:
        for module, training in modes.items():
            module.training = training


def _name(model: PreTrainedModel) -> str:
    return str(getattr(model.config, "_name_or_path", "") or type(model).__name__)


def _unsupported(model: PreTrainedModel, why: str) -> ModelRejected:
    return ModelRejected(
        Reason.MODEL_UNSUPPORTED,
        f"{_name(model)!r} of family {model.config.model_type!r} cannot be trained or asked in chunks: {why}",
    )
