"""Loading a Hugging Face causal language model so that the engine can run it on ragged batches.

The only place that loads a model. What runs it, and whether it is taken at all, is decided in `engine.admission`.
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

from fusionroute.engine.admission import admitted_network, unsupported
from fusionroute.engine.attention import RaggedBatch
from fusionroute.engine.host_copies import HostCopies
from fusionroute.engine.kv_cache import KVCache
from fusionroute.engine.network import Network
from fusionroute.errors import ModelRejected, Reason, invalid
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

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}

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
        model: a transformers causal LM.
        tokenizer: its tokenizer.
        facts: which model this is.
        network: runs the model's forward; keeps hidden states if there are heads.
        heads: maps final hidden states [n, H] to scores [n, k].
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        facts: ModelFacts,
        network: Network,
        heads: Heads | None = None,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.facts = facts
        self.end_ids = end_ids(tokenizer, model.generation_config)
        self._network = network
        self._heads = heads
        self._copies = HostCopies(model.device)

    @property
    def runs_in_any_thread(self) -> bool:
        """Whether forwards may be run by one thread and then by another."""
        return str(self.model.device) == "cpu"

    @property
    def runs_in_one_thread(self) -> bool:
        """Whether all that forwards compute is in the time of the thread that runs them."""
        return self.runs_in_any_thread and torch.get_num_threads() == 1

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
            exact: rows have the same bits whatever else is in the forward, and however the tokens came before, if
                those were computed so too.

        Raises:
            InvalidRequest: `exact` of a model that is not run by our own decoder.
        """
        if exact and not self._network.can_be_exact:
            raise invalid("exact", True, f"False for {self.facts.name!r}, whose forward is its module's")
        batch.exact = exact
        logits, hidden = self._network.run(batch, token_ids, positions, wanted)
        if self._heads is None or hidden is None:
            return ForwardOutput(self._copies.take(logits)[0], None)
        rows, head_scores = self._copies.take(logits, self._scores(self._heads, hidden, exact))
        return ForwardOutput(rows, head_scores)

    @staticmethod
    def _scores(heads: Heads, hidden: Tensor, exact: bool) -> Tensor:
        """Scores [n, k]; the exact ones each alone, so that all have been computed in the same shape."""
        if not exact or hidden.shape[0] <= 1:
            return heads(hidden)
        return torch.cat([heads(row) for row in hidden[:, None]])


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
    network = admitted_network(
        model,
        name=name,
        width=width,
        max_context_tokens=facts.max_context_tokens,
        keeps_hidden=heads is not None,
    )
    return LoadedModel(model, tokenizer, facts, network, heads)


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
        raise unsupported(config.model_type, path_or_id, first_line(error)) from error
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
