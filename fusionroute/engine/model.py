"""Loading a Hugging Face causal language model so that the engine can run it on ragged batches.

The only place that loads a model. A family that is not known to work is admitted when its ragged logits equal those
of its own eager attention on a short check, else refused by name.
"""

from __future__ import annotations

import hashlib
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fusionroute.engine import attention
from fusionroute.engine.attention import RaggedBatch, Segment, UnsupportedAttention
from fusionroute.engine.kv_cache import KVCache, SessionCache
from fusionroute.errors import ModelRejected, Reason
from fusionroute.vocabulary import (
    check_location,
    end_ids,
    first_line,
    load_tokenizer,
    logits_width,
    tokenizer_fingerprint,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

FAMILIES = ("gemma2", "llama", "qwen2", "qwen3")
"""Families (transformers' model_type) that are tested; others must pass the check at load."""

ROPE_TYPES_REFUSED = ("dynamic", "longrope")
"""Their rotary angles depend on the longest sequence in the row, not on the session alone."""

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}

CHECK_TOLERANCE = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
"""Largest difference from eager logits, relative to the largest logit, that the check at load forgives."""

Heads = Callable[[Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """Which model this is; `ModelIdentity` on the wire."""

    name: str
    weights_fingerprint: str
    tokenizer_fingerprint: str
    logits_width: int
    family: str
    dtype: str
    max_context_tokens: int
    epoch: int


@dataclass(slots=True)
class ForwardOutput:
    """Logits [wanted rows, logits width] and, of a router, its heads' scores [wanted rows, k] in float32."""

    rows: Tensor
    head_scores: Tensor | None


class LoadedModel:
    """A model ready for ragged batches.

    Args:
        model: a transformers causal LM whose attention is `attention.ragged_attention`.
        tokenizer: its tokenizer.
        facts: which model this is.
        heads: maps final hidden states [n, H] to scores [n, k].
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        facts: ModelFacts,
        heads: Heads | None = None,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.facts = facts
        self.end_ids = end_ids(tokenizer, model.generation_config)
        self._heads = heads
        self._final = _FinalHidden()
        if heads is not None:
            model.get_output_embeddings().register_forward_pre_hook(self._final.keep)

    def kv_cache(self) -> KVCache:
        """Empty caches for the sessions of an engine."""
        return KVCache()

    def forward(
        self,
        batch: RaggedBatch,
        token_ids: Sequence[int],
        positions: Sequence[int],
        wanted: Sequence[int],
        *,
        exact: bool = False,
    ) -> ForwardOutput:
        """Runs one packed row.

        Args:
            batch: the segments of the row.
            token_ids, positions: of every column.
            wanted: columns whose logits are returned, in this order.
            exact: rows have the same bits whatever else is in the forward.

        Raises:
            UnsupportedAttention: `exact` of a model that cannot.
        """
        if exact:
            raise UnsupportedAttention("rows of this model depend on what else is in the forward")
        device = self.model.device
        logits = self.model(
            input_ids=torch.tensor([token_ids], device=device),
            position_ids=torch.tensor([positions], device=device),
            logits_to_keep=torch.tensor(wanted, dtype=torch.long, device=device),
            use_cache=False,
            ragged_batch=batch,
        ).logits
        rows = logits[0, :, : self.facts.logits_width].to("cpu")
        head_scores = None
        if self._heads is not None and (hidden := self._final.take()) is not None:
            head_scores = self._heads(hidden[0]).to("cpu")
        return ForwardOutput(rows, head_scores)


class _FinalHidden:
    """What the output embeddings were given last. Apart from the model, which would else never be freed at once."""

    def __init__(self) -> None:
        self._hidden: Tensor | None = None

    def keep(self, _module: torch.nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self._hidden = inputs[0]

    def take(self) -> Tensor | None:
        hidden, self._hidden = self._hidden, None
        return hidden


def load_model(
    path_or_id: str,
    *,
    dtype: str = "auto",
    device: str = "cpu",
    heads: Heads | None = None,
    epoch: int | None = None,
) -> LoadedModel:
    """Loads a causal LM and its tokenizer from a local folder or a hub id, checks it and warms it up.

    Args:
        path_or_id: where from.
        dtype: "float32", "float16", "bfloat16", or "auto" for the format of the stored weights.
        device: a torch device.
        heads: a router's heads.
        epoch: of these weights; None = milliseconds since 1970, which no later load can undercut.

    Raises:
        ModelRejected: MODEL_NOT_FOUND, MODEL_UNSUPPORTED, MODEL_BROKEN or VOCABULARY_MISMATCH, naming the model.
    """
    check_location(path_or_id)
    model = load_weights(path_or_id, dtype, device)
    tokenizer = load_tokenizer(path_or_id)
    return prepare_model(model, tokenizer, name=path_or_id, heads=heads, epoch=epoch)


@torch.inference_mode()
def prepare_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    name: str,
    heads: Heads | None = None,
    epoch: int | None = None,
) -> LoadedModel:
    """Makes a model that is already in memory ready for the engine, with the same checks as `load_model`."""
    width = logits_width(tokenizer)
    embeddings = model.get_input_embeddings().weight.shape[0]
    if embeddings < width:
        raise ModelRejected(
            Reason.VOCABULARY_MISMATCH,
            f"{name!r} has {embeddings} token embeddings, its tokenizer knows {width} ids",
        )
    _check_rope(model.config, name)
    facts = ModelFacts(
        name=name,
        weights_fingerprint=weights_fingerprint(model),
        tokenizer_fingerprint=tokenizer_fingerprint(tokenizer),
        logits_width=width,
        family=model.config.model_type,
        dtype=str(model.dtype).removeprefix("torch."),
        max_context_tokens=int(getattr(model.config, "max_position_embeddings", 1 << 20)),
        epoch=time.time_ns() // 1_000_000 if epoch is None else epoch,
    )
    attention.register()
    model.eval()
    eager = None
    if facts.family not in FAMILIES:
        eager = _eager_logits(model, _check_tokens(width))
    model.set_attn_implementation(attention.IMPLEMENTATION)
    loaded = LoadedModel(model, tokenizer, facts, heads)
    _warm_up(loaded, eager)
    return loaded


def weights_fingerprint(model: PreTrainedModel) -> str:
    """Digest of a sample of every tensor: name, shape and up to 4,096 evenly spread numbers."""
    hasher = hashlib.sha256()
    for name, tensor in sorted(model.state_dict(keep_vars=True).items()):
        # Of a part of a model the whole tensor, put together with the other processes.
        whole = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
        flat = whole.detach().reshape(-1)
        step = max(1, flat.numel() // 4096)
        sample = flat[::step].to("cpu").contiguous()
        hasher.update(f"{name}:{tuple(tensor.shape)}:{tensor.dtype}".encode())
        hasher.update(sample.view(torch.uint8).numpy().tobytes())
    return hasher.hexdigest()[:32]


def load_weights(
    path_or_id: str, dtype: str, device: str, *, check_part: Callable[[Any], None] | None = None
) -> PreTrainedModel:
    """The model with its eager attention, all weights there.

    Args:
        path_or_id, dtype, device: as `load_model`.
        check_part: if given, only this process's part is loaded, of as many as torch.distributed has; it is called
            with the model's configuration first, and raises ModelRejected if that cannot be split so.

    Raises:
        ModelRejected: MODEL_NOT_FOUND, MODEL_UNSUPPORTED or MODEL_BROKEN.
    """
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    if not sys.stderr.isatty():
        disable_progress_bar()
    try:
        config = AutoConfig.from_pretrained(path_or_id, trust_remote_code=False)
    except Exception as error:
        raise _not_loadable(path_or_id, error) from error
    split: dict[str, Any] = {}
    if check_part is not None:
        from transformers.distributed import DistributedConfig

        check_part(config)
        split = {"distributed_config": DistributedConfig(tp_plan="auto")}
    wanted_dtype: torch.dtype | str = "auto" if dtype == "auto" else DTYPES[dtype]
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            path_or_id,
            config=config,
            dtype=wanted_dtype,
            attn_implementation="eager",
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
            **split,
        )
    except ValueError as error:
        raise _unsupported(config.model_type, path_or_id, first_line(error)) from error
    except Exception as error:
        raise _not_loadable(path_or_id, error) from error
    if info["missing_keys"] or info["mismatched_keys"]:
        lacking = sorted(info["missing_keys"]) + sorted(str(key) for key in info["mismatched_keys"])
        raise ModelRejected(
            Reason.MODEL_BROKEN,
            f"{path_or_id!r} lacks weights: {', '.join(lacking[:5])}{' ...' if len(lacking) > 5 else ''}",
        )
    return _detached_from_files(model if split else model.to(device))


def _detached_from_files(model: PreTrainedModel) -> PreTrainedModel:
    """The same model in memory of its own.

    On a CPU safetensors maps the file: whoever overwrites it would change the weights that serve, or end the process.
    """
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.device.type == "cpu":
            tensor.data = tensor.data.clone()
    return model


def _not_loadable(path_or_id: str, error: Exception) -> ModelRejected:
    reason = Reason.MODEL_BROKEN if Path(path_or_id).expanduser().is_dir() else Reason.MODEL_NOT_FOUND
    return ModelRejected(reason, f"{path_or_id!r} cannot be loaded: {first_line(error)}")


def _unsupported(family: str, name: str, why: str) -> ModelRejected:
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
            raise _unsupported(config.model_type, name, f"rope_type {rope_type!r} depends on the batch")


def _check_tokens(width: int) -> list[int]:
    return [(7 * step + 3) % width for step in range(24)]


def _eager_logits(model: PreTrainedModel, tokens: list[int]) -> Tensor:
    model.set_attn_implementation("eager")
    logits: Tensor = model(input_ids=torch.tensor([tokens], device=model.device), use_cache=False).logits
    return logits[0].to("cpu")


def _warm_up(loaded: LoadedModel, eager: Tensor | None) -> None:
    """One prompt in two chunks beside another session: finite logits, and equal to eager ones where those are given."""
    facts = loaded.facts
    tokens = _check_tokens(facts.logits_width)[: facts.max_context_tokens]
    half = len(tokens) // 2
    mine, other = SessionCache(len(tokens)), SessionCache(len(tokens))
    rows = []
    try:
        for start, stop in ((0, half), (half, len(tokens))):
            count = stop - start
            batch = RaggedBatch([Segment(mine, start, 0, count), Segment(other, start, count, 2 * count)])
            chunk, positions = tokens[start:stop], list(range(start, stop))
            output = loaded.forward(batch, chunk + chunk[::-1], positions * 2, range(count))
            rows.append(output.rows)
    except (UnsupportedAttention, TypeError) as error:
        raise _unsupported(facts.family, facts.name, str(error)) from error
    got = torch.cat(rows)
    if not torch.isfinite(got).all():
        raise ModelRejected(
            Reason.MODEL_BROKEN,
            f"{facts.name!r} produces logits that are not finite (NaN or infinite weights?)",
        )
    if eager is not None:
        wanted = eager[:, : facts.logits_width].float()
        difference = float((got.float() - wanted).abs().max() / wanted.abs().max().clamp_min(1e-6))
        limit = CHECK_TOLERANCE[loaded.model.dtype]
        if difference > limit:
            raise _unsupported(
                facts.family,
                facts.name,
                f"its logits differ from eager ones by {difference:.1e}, limit {limit:.0e}",
            )
