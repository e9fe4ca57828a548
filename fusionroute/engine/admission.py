"""Which models are taken, and what runs their forward: nothing that was not held against the model's own code."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

import structlog
import torch
from torch import Tensor

from fusionroute.engine import attention
from fusionroute.engine.attention import RaggedBatch, Segment, UnsupportedAttention
from fusionroute.engine.decode_graphs import GraphedDecoder
from fusionroute.engine.decoder import Decoder, decoder_of
from fusionroute.engine.kv_cache import SessionCache
from fusionroute.engine.module_forward import ModuleForward
from fusionroute.engine.network import Network
from fusionroute.engine.parallel_decoder import is_part, split_decoder_of
from fusionroute.engine.row_products import ROW_COUNTS
from fusionroute.errors import ModelRejected, Reason

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FAMILIES = ("gemma2", "llama", "qwen2", "qwen3")
"""Families (transformers' model_type) that are tested; others must pass the check at load."""

ROPE_TYPES_REFUSED = ("dynamic", "longrope")
"""Their rotary angles depend on the longest sequence in the row, not on the session alone."""

CHECK_TOLERANCE = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
"""Length of the difference from eager logits, relative to their own, that the check at load forgives.

Not the largest difference: among millions of 16-bit logits there is always one that is off by a tenth of the range.
"""

CHECK_TOKENS = 24

log = structlog.get_logger(__name__)


@torch.inference_mode()
def admitted_network(
    model: PreTrainedModel, *, name: str, width: int, max_context_tokens: int, keeps_hidden: bool
) -> Network:
    """What is to run the model's forward: our own decoder where it gives the model's logits, else the module.

    Args:
        model: in memory, in any state; its attention is replaced.
        name: for messages.
        width: logits per row.
        max_context_tokens: the most that the model takes.
        keeps_hidden: whether final hidden states are wanted.

    Raises:
        ModelRejected: MODEL_UNSUPPORTED or MODEL_BROKEN, naming the model.
    """
    _check_rope(model.config, name)
    family = model.config.model_type
    attention.register()
    model.eval()
    tokens = [(7 * step + 3) % width for step in range(min(CHECK_TOKENS, max_context_tokens))]
    decoder = decoder_of(model, width, GraphedDecoder if model.device.type == "cuda" else Decoder)
    eager = None
    if decoder is not None or is_part(model) or family not in FAMILIES:
        eager = _finite(_eager_logits(model, tokens)[:, :width], name)
    model.set_attn_implementation(attention.IMPLEMENTATION)
    if is_part(model) and eager is not None and (split := split_decoder_of(model, width)) is not None:
        if (fault := _difference(_rows_in_chunks(split, tokens), eager)) is not None:
            raise unsupported(family, name, f"split over several processes, {fault}")
        split.choose_layouts()
        return split
    if decoder is not None and eager is not None:
        if (fault := _difference(_rows_in_chunks(decoder, tokens), eager)) is None:
            decoder.choose_layouts()
            if decoder.has_row_kernels and (
                fault := _difference(_finite(_rows_by_kernels(decoder, tokens), name), eager)
            ):
                log.warning("row_kernels_not_used", model=name, family=family, why=fault)
                decoder.drop_row_kernels()
            return decoder
        log.warning("decoder_not_used", model=name, family=family, why=fault)
    network = ModuleForward(model, width, keeps_hidden=keeps_hidden)
    try:
        rows = _finite(_rows_in_chunks(network, tokens), name)
    except (UnsupportedAttention, TypeError) as error:
        raise unsupported(family, name, str(error)) from error
    is_tested = family in FAMILIES
    if eager is not None and not is_tested and (fault := _difference(rows, eager)) is not None:
        raise unsupported(family, name, fault)
    return network


def unsupported(family: str, name: str, why: str) -> ModelRejected:
    """The refusal of a model that the engine cannot run."""
    return ModelRejected(
        Reason.MODEL_UNSUPPORTED,
        f"{name!r} is of family {family!r}, which is not supported ({why}); supported: {', '.join(FAMILIES)}",
    )


def _check_rope(config: Any, name: str) -> None:
    parameters = getattr(config, "rope_parameters", None) or {}
    layers = parameters.values() if all(isinstance(v, dict) for v in parameters.values()) else [parameters]
    for layer in layers:
        rope_type = layer.get("rope_type") if isinstance(layer, dict) else None
        if rope_type in ROPE_TYPES_REFUSED:
            raise unsupported(config.model_type, name, f"rope_type {rope_type!r} depends on the batch")


def _eager_logits(model: PreTrainedModel, tokens: list[int]) -> Tensor:
    model.set_attn_implementation("eager")
    logits: Tensor = model(input_ids=torch.tensor([tokens], device=model.device), use_cache=False).logits
    return logits[0].to("cpu")


def _rows_in_chunks(network: Network, tokens: list[int]) -> Tensor:
    """Logits of one prompt in two chunks, each beside another session."""
    half = len(tokens) // 2
    mine, other = SessionCache(len(tokens)), SessionCache(len(tokens))
    rows = []
    for start, stop in ((0, half), (half, len(tokens))):
        count = stop - start
        batch = RaggedBatch([Segment(mine, start, 0, count), Segment(other, start, count, 2 * count)])
        chunk, positions = tokens[start:stop], list(range(start, stop))
        rows.append(network.run(batch, chunk + chunk[::-1], positions * 2, range(count))[0].to("cpu"))
    return torch.cat(rows)


def _rows_by_kernels(network: Network, tokens: list[int]) -> Tensor:
    """Logits of one prompt in forwards of so few rows that kernels of our own compute them."""
    cache = SessionCache(len(tokens))
    rows = []
    start = 0
    for count in itertools.cycle(ROW_COUNTS):
        stop = min(start + count, len(tokens))
        batch = RaggedBatch([Segment(cache, start, 0, stop - start)])
        rows.append(network.run(batch, tokens[start:stop], range(start, stop), range(stop - start))[0])
        start = stop
        if start == len(tokens):
            break
    return torch.cat(rows)


def _finite(rows: Tensor, name: str) -> Tensor:
    if not torch.isfinite(rows).all():
        raise ModelRejected(
            Reason.MODEL_BROKEN,
            f"{name!r} produces logits that are not finite (NaN or infinite weights?)",
        )
    return rows


def _difference(rows: Tensor, eager: Tensor) -> str | None:
    """What is wrong with the rows; None if nothing is."""
    wanted = eager.float()
    difference = float((rows.float() - wanted).norm() / wanted.norm().clamp_min(1e-6))
    limit = CHECK_TOLERANCE[eager.dtype]
    if difference <= limit:
        return None
    return f"its logits differ from eager ones by {difference:.1e}, limit {limit:.0e}"
