"""Vocabulary rows that never exist all at once: what is computed of them in forward is computed again in backward.

A row has V numbers, V may be 256,000, and a micro-batch thousands of tokens; no more than `chunk_tokens` rows are alive
at any time. What reads them in float32 does so by small blocks, so that it needs no second chunk.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

BLOCK_NUMBERS = 1 << 22


@dataclass(frozen=True, slots=True)
class RowMaker:
    """rows = softcap * tanh(scale * (h W^T + b) / softcap), over the first V = `width` entries of the vocabulary.

    Attributes:
        width: V; entries of W beyond it are padding and get no gradient.
        softcap: of the final logits (Gemma); None = none.
        scale: of the logits before the soft-cap (Cohere, Granite, ...).
        dtype: of the matrix products; everything after them is float32 or wider.
        block_numbers: numbers of a block, which are read and written at a time.
    """

    width: int
    softcap: float | None
    scale: float
    dtype: torch.dtype
    block_numbers: int = BLOCK_NUMBERS

    @property
    def exact_dtype(self) -> torch.dtype:
        """Of everything but the matrix products."""
        return torch.promote_types(self.dtype, torch.float32)

    def cast(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The parameters cut to V and in `dtype`; one copy for all chunks, none where nothing changes."""
        cut = weight[: self.width].to(self.dtype)
        return cut, None if bias is None else bias[: self.width].to(self.dtype)

    def buffer(self, like: Tensor, num_rows: int) -> Tensor:
        """Room ``[num_rows, V]`` for `products`; one for all chunks, else two would be alive in passing."""
        return like.new_empty((num_rows, self.width), dtype=self.dtype)

    def products(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, buffer: Tensor) -> Tensor:
        """``[c, H]`` to ``[c, V]`` in the buffer: h W^T + b alone, for parameters from `cast`."""
        out = buffer[: len(hidden)]
        if bias is None:
            return torch.mm(hidden.to(self.dtype), weight.T, out=out)
        return torch.addmm(bias, hidden.to(self.dtype), weight.T, out=out)

    def blocks(self, products: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Rows in float32, a few at a time; they may overwrite the products."""
        size = max(1, self.block_numbers // max(1, products.shape[1]))
        for first in range(0, len(products), size):
            block = slice(first, first + size)
            yield block, self.finished_(products[block])

    def slope(self, rows: Tensor, outer: Tensor) -> Tensor:
        """d rows / d products times the gradients ``[c]`` that reach the rows, from finished rows: what broadcasts."""
        factor = outer[:, None] * self.scale
        if self.softcap is None:
            return factor
        return rows.div(self.softcap).square_().neg_().add_(1).mul_(factor)

    def finished_(self, products: Tensor) -> Tensor:
        """Rows in float32 from products, in their memory where they are float32 already."""
        rows = products.to(self.exact_dtype)
        if self.scale != 1:
            rows.mul_(self.scale)
        if self.softcap is not None:
            rows.div_(self.softcap).tanh_().mul_(self.softcap)
        return rows


def logsumexp_(rows: Tensor) -> Tensor:
    """``[c, V]`` to ``[c]``; overwrites the rows, so that no second copy of them exists."""
    top = rows.amax(dim=1)
    return rows.sub_(top[:, None]).exp_().sum(dim=1).log_().add_(top)


class GoldLogprobs(torch.autograd.Function):
    """log softmax(row)[gold] of each token: hidden ``[T, H]``, W ``[>= V, H]``, b, gold ``[T]`` to ``[T]``.

    d/d row = onehot(gold) - softmax(row).
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        gold: Tensor,
        maker: RowMaker,
        chunk_tokens: int,
    ) -> Tensor:
        logprobs = hidden.new_empty(len(hidden), dtype=maker.exact_dtype)
        logsumexp = torch.empty_like(logprobs)
        with torch.autocast(hidden.device.type, enabled=False):
            cut, offset = maker.cast(weight, bias)
            buffer = maker.buffer(hidden, min(len(hidden), chunk_tokens))
            for chunk in chunks(len(hidden), chunk_tokens):
                for block, rows in maker.blocks(maker.products(hidden[chunk], cut, offset, buffer)):
                    place = _within(chunk, block)
                    score = rows.gather(1, gold[place, None])[:, 0]
                    logsumexp[place] = logsumexp_(rows)
                    logprobs[place] = score - logsumexp[place]
        ctx.save_for_backward(hidden, weight, bias, gold, logsumexp)
        ctx.maker, ctx.chunk_tokens = maker, chunk_tokens
        return logprobs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, gold, logsumexp = ctx.saved_tensors
        maker: RowMaker = ctx.maker
        (outer,) = upstream
        with torch.autocast(hidden.device.type, enabled=False):
            gradient = _HeadGradient(maker, hidden, weight, bias, ctx.needs_input_grad[:3])
            buffer = maker.buffer(hidden, min(len(hidden), ctx.chunk_tokens))
            for chunk in chunks(len(hidden), ctx.chunk_tokens):
                products = gradient.products(hidden[chunk], buffer)
                for block, rows in maker.blocks(products):
                    place = _within(chunk, block)
                    slope = maker.slope(rows, -outer[place])
                    rows.sub_(logsumexp[place, None]).exp_()
                    rows[torch.arange(len(rows), device=rows.device), gold[place]] -= 1
                    rows.mul_(slope)
                    if rows.dtype != products.dtype:  # else the rows lie in the products' memory
                        products[block] = rows
                gradient.add(chunk, products)
        return (*gradient.parts(), None, None, None)


@dataclass(frozen=True, slots=True)
class FrozenRows:
    """What the rows of one frozen expert are made from: hidden ``[T, H_k]``, W, b."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    maker: RowMaker


class FusedLogPartition(torch.autograd.Function):
    """log sum_v pi_k(v) pi_theta(v) of each token, k being its route; no gradient reaches the experts.

    d/d r = softmax(e_k + r) - softmax(r).
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        experts: Sequence[FrozenRows],
        routes: Tensor,
        maker: RowMaker,
        chunk_tokens: int,
    ) -> Tensor:
        own = hidden.new_empty(len(hidden), dtype=maker.exact_dtype)
        joint, result = torch.empty_like(own), torch.empty_like(own)
        with torch.autocast(hidden.device.type, enabled=False):
            cut, offset = maker.cast(weight, bias)
            buffer = maker.buffer(hidden, _half(chunk_tokens, len(hidden)))
            for expert, places in _by_route(experts, routes, chunk_tokens):
                parameters = expert.maker.cast(expert.weight, expert.bias)
                room = expert.maker.buffer(hidden, len(places[0]))
                for piece in places:
                    mine = maker.products(hidden[piece], cut, offset, buffer)
                    theirs = expert.maker.products(expert.hidden[piece], *parameters, room)
                    for block, router_rows in maker.blocks(mine):
                        expert_rows = expert.maker.finished_(theirs[block])
                        tokens = piece[block]
                        joint[tokens] = logsumexp_(router_rows + expert_rows)
                        own[tokens] = logsumexp_(router_rows)
                        result[tokens] = joint[tokens] - own[tokens] - logsumexp_(expert_rows)
        ctx.save_for_backward(hidden, weight, bias, routes, own, joint)
        ctx.experts, ctx.maker, ctx.chunk_tokens = experts, maker, chunk_tokens
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, routes, own, joint = ctx.saved_tensors
        maker: RowMaker = ctx.maker
        (outer,) = upstream
        with torch.autocast(hidden.device.type, enabled=False):
            gradient = _HeadGradient(maker, hidden, weight, bias, ctx.needs_input_grad[:3])
            buffer = maker.buffer(hidden, _half(ctx.chunk_tokens, len(hidden)))
            for expert, places in _by_route(ctx.experts, routes, ctx.chunk_tokens):
                parameters = expert.maker.cast(expert.weight, expert.bias)
                room = expert.maker.buffer(hidden, len(places[0]))
                for piece in places:
                    mine = gradient.products(hidden[piece], buffer)
                    theirs = expert.maker.products(expert.hidden[piece], *parameters, room)
                    for block, rows in maker.blocks(mine):
                        fused = expert.maker.finished_(theirs[block])
                        tokens = piece[block]
                        slope = maker.slope(rows, outer[tokens])
                        fused.add_(rows).sub_(joint[tokens, None]).exp_()
                        rows.sub_(own[tokens, None]).exp_()
                        mine[block] = fused.sub_(rows).mul_(slope)
                    gradient.add(piece, mine)
        return (*gradient.parts(), None, None, None, None)


class _HeadGradient:
    """Gradients of hidden states, W and b, gathered chunk by chunk from those of the products."""

    def __init__(
        self, maker: RowMaker, hidden: Tensor, weight: Tensor, bias: Tensor | None, needed: Sequence[bool]
    ) -> None:
        self._maker, self._inputs = maker, (hidden, weight, bias)
        self._weight, self._bias = maker.cast(weight, bias)
        self._of_hidden = torch.zeros_like(hidden) if needed[0] else None
        self._of_weight = self._sums(weight) if needed[1] else None
        self._of_bias = self._sums(bias) if bias is not None and needed[2] else None

    def products(self, hidden: Tensor, buffer: Tensor) -> Tensor:
        """The products again, as in forward."""
        return self._maker.products(hidden, self._weight, self._bias, buffer)

    def add(self, place: slice | Tensor, products: Tensor) -> None:
        """Gradients ``[c, V]`` of the products of these tokens."""
        hidden = self._inputs[0]
        if self._of_hidden is not None:
            self._of_hidden[place] = (products @ self._weight).to(hidden.dtype)
        if self._of_weight is not None:
            self._add_outer(self._of_weight, products, hidden[place].to(products.dtype))
        if self._of_bias is not None:
            self._of_bias[: self._maker.width] += products.sum(dim=0, dtype=self._of_bias.dtype)

    def parts(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Each in the dtype of its input."""
        gradients = (self._of_hidden, self._of_weight, self._of_bias)
        pairs = zip(gradients, self._inputs, strict=True)
        first, second, third = (g if g is None or i is None else g.to(i.dtype) for g, i in pairs)
        return first, second, third

    @staticmethod
    def _add_outer(total: Tensor, products: Tensor, hidden: Tensor) -> None:
        if total.dtype == products.dtype:
            total[: products.shape[1]].addmm_(products.T, hidden)
            return
        size = max(1, BLOCK_NUMBERS // max(1, hidden.shape[1]))
        for first in range(0, products.shape[1], size):
            columns = products[:, first : first + size]
            total[first : first + columns.shape[1]] += columns.T @ hidden

    @staticmethod
    def _sums(parameter: Tensor) -> Tensor:
        """Zeros in which sums over chunks do not lose the digits that a bf16 parameter would."""
        return torch.zeros_like(parameter, dtype=torch.promote_types(parameter.dtype, torch.float32))


def chunks(num_tokens: int, chunk_tokens: int) -> Iterator[slice]:
    """Slices of at most `chunk_tokens` that cover all tokens."""
    for first in range(0, num_tokens, chunk_tokens):
        yield slice(first, min(first + chunk_tokens, num_tokens))


def _within(chunk: slice, block: slice) -> slice:
    return slice(chunk.start + block.start, min(chunk.start + block.stop, chunk.stop))


def _by_route(
    experts: Sequence[FrozenRows], routes: Tensor, chunk_tokens: int
) -> Iterator[tuple[FrozenRows, Sequence[Tensor]]]:
    """Each expert with the tokens routed to it; half a chunk at a time, because each token has two rows."""
    for index, expert in enumerate(experts):
        tokens = (routes == index).nonzero()[:, 0]
        if len(tokens) > 0:
            yield expert, torch.split(tokens, _half(chunk_tokens, len(routes)))


def _half(chunk_tokens: int, num_tokens: int) -> int:
    return max(1, min(chunk_tokens // 2, num_tokens))
