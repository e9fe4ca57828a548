"""The forward of the known families without the module tree: the same weights, a quarter of the calls.

    embed -> [norm, qkv, rotate, attend, o] + -> [norm, gate and up, down] + -> ... -> norm -> logits of wanted rows

Works on the weights of transformers' module, which stays usable. What it computes is held against that module at load.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding

from fusionroute.engine.activations import Activation, activation_of, by_rows
from fusionroute.engine.attention import RaggedBatch, attend
from fusionroute.engine.exact_tiles import ExactTiles, padded
from fusionroute.engine.fused_weights import can_fuse, fuse
from fusionroute.engine.logits_head import LogitsHead
from fusionroute.engine.rotary import RotaryTable
from fusionroute.engine.row_norm import RowNorm
from fusionroute.engine.row_products import BUDGET_SECONDS, RowProducts
from fusionroute.engine.row_step import RowStep, can_step, compiled_step

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CLASSES = ("Gemma2ForCausalLM", "LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")

Linear = Callable[[Tensor, Tensor, Tensor | None], Tensor]


def decoder_of(model: PreTrainedModel, width: int, kind: type[Decoder] | None = None) -> Decoder | None:
    """The model's lean forward; None if it is of another family, split over devices, hooked into, or not plain.

    Args:
        kind: which decoder; None = `Decoder`.
    """
    if type(model).__name__ not in CLASSES or not _is_plain(model):
        return None
    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        if not can_fuse([attention.q_proj, attention.k_proj, attention.v_proj]):
            return None
        if not can_fuse([mlp.gate_proj, mlp.up_proj]):
            return None
    return (kind or Decoder)(model, width)


def _is_plain(model: PreTrainedModel) -> bool:
    """Whether all maps are torch's own, of one number format on one device, and nobody listens to any module."""
    kinds = {(type(each), type(each.data), each.dtype, each.device) for each in model.parameters()}
    if len(kinds) != 1 or next(iter(kinds))[:2] != (nn.Parameter, Tensor):
        return False
    for name, module in model.named_modules():
        if name.endswith("_proj") and type(module) is not nn.Linear:
            return False
        if module._forward_hooks or module._forward_pre_hooks:
            return False
    return type(model.lm_head) is nn.Linear and model.lm_head.bias is None


@dataclass(slots=True)
class Pass:
    """One forward on its way through the layers.

    Attributes:
        joined: as `linear`, for maps whose inputs a split model has in several processes.
    """

    batch: RaggedBatch
    cos: Tensor
    sin: Tensor
    rotate: Callable[[Tensor, Tensor, Tensor], Tensor]
    linear: Linear
    joined: Linear
    activate: Activation
    num_padding: int = 0

    @property
    def exact(self) -> bool:
        return self.batch.exact


class Decoder:
    """A causal LM of a known family, ready for ragged batches.

    Args:
        model: whose weights; q, k, v and gate, up become views of fused ones.
        width: logits per row.
    """

    def __init__(self, model: PreTrainedModel, width: int) -> None:
        inner, config = model.model, model.config
        is_gemma = config.model_type == "gemma2"
        one = 1.0 if is_gemma else 0.0
        self._embeddings: Tensor = inner.embed_tokens.weight.detach()
        self._scale = torch.tensor(config.hidden_size**0.5).to(self._embeddings) if is_gemma else None
        self._layers = [_Layer(layer, config, one) for layer in inner.layers[: config.num_hidden_layers]]
        self._final_norm = RowNorm(inner.norm.weight.detach().float() + one, config.rms_norm_eps)
        size = self._layers[0].size
        self._rotary = RotaryTable(inner.rotary_emb, self._embeddings, size, config.max_position_embeddings)
        self._products = RowProducts()
        self._step: RowStep | None = None
        self._head = LogitsHead(
            model.lm_head.weight.detach()[:width],
            getattr(config, "final_logit_softcapping", None),
            self._products,
        )
        self._activate = activation_of(inner.layers[0].mlp.act_fn)
        self._tiles = ExactTiles()
        self._joined: Linear = self._products.linear

    can_be_exact = True
    may_step = True
    """Whether all that a layer computes is its own process's."""

    def choose_layouts(self) -> None:
        """Measures which products are fast on this machine; takes up to two seconds or so."""
        if self._products.prepare(self._embeddings):
            self._products.choose([weight for layer in self._layers for weight in layer.weights])
        self._head.choose_layouts()
        is_plain = self._products.is_there and self.may_step and can_step(self)
        if is_plain and (kernel := compiled_step(self._embeddings.dtype)) is not None:
            self._step = RowStep(self, kernel)
            self._step.choose(self, time.monotonic() + BUDGET_SECONDS)

    @property
    def has_row_kernels(self) -> bool:
        """Whether few rows are computed by kernels of our own, if those are faster."""
        return self._products.is_there

    def drop_row_kernels(self) -> None:
        """Leaves all products to torch."""
        self._products.drop()
        self._step = None
        self._head.choose_layouts()

    def run(
        self, batch: RaggedBatch, token_ids: Sequence[int], positions: Sequence[int], wanted: Sequence[int]
    ) -> tuple[Tensor, Tensor]:
        """Logits [wanted, width] and final hidden states [wanted, H]; exact if the batch is."""
        if batch.exact:
            return self._run_exact(batch, token_ids, positions, wanted)
        kept = None
        if len(wanted) != len(token_ids):
            kept = torch.tensor(wanted, dtype=torch.long, device=self._embeddings.device)
        if self._step is not None and 0 < len(token_ids) <= self._step.most_rows:
            hidden = self._step.hidden(batch, token_ids, positions)
            if hidden is not None:
                hidden = hidden if kept is None else hidden.index_select(0, kept)
                return self._head(hidden), hidden
        hidden = self.hidden_by_torch(batch, token_ids, positions, kept)
        return self._head(hidden), hidden

    def hidden_by_torch(
        self,
        batch: RaggedBatch,
        token_ids: Sequence[int],
        positions: Sequence[int],
        kept: Tensor | None = None,
    ) -> Tensor:
        """Final hidden states [kept, H] of the columns `kept`; None = all; one operation after another."""
        cos, sin = self._rotary.at(positions)
        rotate, product = self._rotary.rotate, self._products.linear
        run = Pass(batch, cos, sin, rotate, product, self._joined, self._activate)
        return self._hidden(run, token_ids, kept)

    def _run_exact(
        self, batch: RaggedBatch, token_ids: Sequence[int], positions: Sequence[int], wanted: Sequence[int]
    ) -> tuple[Tensor, Tensor]:
        """By kernels, which compute each row alone, or by torch in tiles of agreeing sizes; never by measurement."""
        kept = torch.tensor(wanted, dtype=torch.long, device=self._embeddings.device)
        if self._step is not None and self._step.is_for_exact:
            self._step.allocate(batch)
            by_kernel = self._step.hidden(batch, token_ids, positions)
            if by_kernel is not None:
                hidden = by_kernel[kept]
                return self._head.exact(hidden), hidden
        # Rows in multiples of a tile from the first operation on, so that each sees the same shapes in any forward.
        num_padding = padded(len(token_ids)) - len(token_ids)
        padding = [0] * num_padding
        cos, sin = self._rotary.at([*positions, *padding])
        activate = by_rows(self._activate)
        exact = self._tiles.linear
        run = Pass(batch, cos, sin, self._rotary.rotate, exact, exact, activate, num_padding)
        hidden = self._hidden(run, [*token_ids, *padding], None)[kept]
        return self._head.exact(hidden), hidden

    def _embedded(self, token_ids: Tensor) -> Tensor:
        """[n] -> [n, H]."""
        return embedding(token_ids, self._embeddings)

    def _first(self, token_ids: Tensor) -> Tensor:
        """What enters the first layer."""
        x = self._embedded(token_ids)
        return x if self._scale is None else x.mul_(self._scale)

    def _hidden(self, run: Pass, token_ids: Sequence[int], kept: Tensor | None) -> Tensor:
        """Final hidden states of the columns `kept`; None = all."""
        x = self._first(torch.tensor(token_ids, device=self._embeddings.device))
        for layer in self._layers[:-1]:
            x = layer(x, run, None)
        return self._final_norm(self._layers[-1](x, run, kept), run.exact)


class _Layer:
    """One decoder layer."""

    def __init__(self, layer: Any, config: Any, one: float) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        self._index = int(attention.layer_idx)
        self.size = int(attention.head_dim)
        num_keys = config.num_key_value_heads
        self._parts = (config.num_attention_heads + num_keys, num_keys)
        self._queries_and_keys = (config.num_attention_heads, num_keys)
        self._scale = float(attention.scaling)
        self._window: int | None = getattr(attention, "sliding_window", None)
        self._softcap: float | None = getattr(attention, "attn_logit_softcapping", None)
        self._qkv, self._qkv_bias = fuse([attention.q_proj, attention.k_proj, attention.v_proj])
        self._o, self._o_bias = fuse([attention.o_proj])
        self._gate_up, self._gate_up_bias = fuse([mlp.gate_proj, mlp.up_proj])
        self._down, self._down_bias = fuse([mlp.down_proj])

        def norm(owner: Any, name: str) -> RowNorm | None:
            module = getattr(owner, name, None)
            return (
                None if module is None else RowNorm(module.weight.detach().float() + one, config.rms_norm_eps)
            )

        self._before_attention = norm(layer, "input_layernorm")
        self._after_attention = None
        self._before_mlp = norm(layer, "post_attention_layernorm")
        self._after_mlp = norm(layer, "post_feedforward_layernorm")
        if self._after_mlp is not None:
            self._after_attention, self._before_mlp = (
                self._before_mlp,
                norm(layer, "pre_feedforward_layernorm"),
            )
        self._query_norm, self._key_norm = norm(attention, "q_norm"), norm(attention, "k_norm")

    @property
    def weights(self) -> tuple[Tensor, ...]:
        """Of its four products, [outputs, inputs] each."""
        return self._qkv, self._o, self._gate_up, self._down

    def __call__(self, x: Tensor, run: Pass, kept: Tensor | None) -> Tensor:
        """Rows [n, H] to rows [n, H], or [kept, H] where nobody needs the others any more."""
        queries, keys, values = self.projected(x, run)
        attended = self._attended(queries, keys, values, run)
        if kept is not None:
            x, attended = x.index_select(0, kept), attended.index_select(0, kept)
        return self.finished(x, attended, run)

    def projected(self, x: Tensor, run: Pass) -> tuple[Tensor, Tensor, Tensor]:
        """Rows [n, H] to queries, keys and values [n, heads, size], turned to their positions."""
        assert self._before_attention is not None
        x = self._before_attention(x, run.exact)
        heads = run.linear(x, self._qkv, self._qkv_bias).view(x.shape[0], -1, self.size)
        turned, values = heads.split_with_sizes(self._parts, 1)
        if self._query_norm is not None and self._key_norm is not None:
            queries, keys = turned.split_with_sizes(self._queries_and_keys, 1)
            turned = torch.cat((self._query_norm(queries, run.exact), self._key_norm(keys, run.exact)), 1)
        queries, keys = run.rotate(turned, run.cos, run.sin).split_with_sizes(self._queries_and_keys, 1)
        return queries, keys, values

    def over_caches(self, batch: RaggedBatch, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """What the queries see of their sessions, [n, heads, size]."""
        return attend(batch, self._index, queries, keys, values, self._scale, self._window, self._softcap)

    def finished(self, x: Tensor, attended: Tensor, run: Pass) -> Tensor:
        """What leaves the layer, [n, H], from what has entered it and [n, heads * size] of attention."""
        assert self._before_mlp is not None
        added = run.joined(attended, self._o, self._o_bias)
        if self._after_attention is not None:
            added = self._after_attention(added, run.exact)
        x = added.add_(x)
        added = self._mlp(self._before_mlp(x, run.exact), run)
        if self._after_mlp is not None:
            added = self._after_mlp(added, run.exact)
        return added.add_(x)

    def _attended(self, queries: Tensor, keys: Tensor, values: Tensor, run: Pass) -> Tensor:
        if not run.num_padding:
            return self.over_caches(run.batch, queries, keys, values).view(queries.shape[0], -1)
        queries, keys, values = (tensor[: -run.num_padding] for tensor in (queries, keys, values))
        attended = self.over_caches(run.batch, queries, keys, values)
        padding = attended.new_zeros((run.num_padding, *attended.shape[1:]))
        return torch.cat((attended, padding)).view(attended.shape[0] + run.num_padding, -1)

    def _mlp(self, x: Tensor, run: Pass) -> Tensor:
        gates, ups = run.linear(x, self._gate_up, self._gate_up_bias).chunk(2, 1)
        return run.joined(run.activate(gates).mul_(ups), self._down, self._down_bias)
