"""Experts inside the trainer: frozen models that give hidden states and vocabulary rows, never a gradient."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import PurePath
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fusionroute.engine import load_model
from fusionroute.engine.model import DTYPES
from fusionroute.errors import ModelRejected, Reason
from fusionroute.router_model import ExpertRecord
from trainer.config import ExpertSource
from trainer.vocabulary_head import VocabularyHead, final_hidden

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class FrozenModel:
    """One expert in memory.

    Attributes:
        model: the causal LM, in evaluation mode, no parameter requires a gradient.
        tokenizer: its tokenizer.
        record: as the manifest knows it; fingerprints are those that a service of this model reports.
        head: from hidden states to rows.
        max_context_tokens: the longest row it can read.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    record: ExpertRecord
    head: VocabularyHead
    max_context_tokens: int

    @classmethod
    def load(
        cls, source: ExpertSource | str, slot: str, device: str | torch.device = "cpu", dtype: str = "auto"
    ) -> FrozenModel:
        """Loads an expert with the same checks that its service makes.

        Args:
            source: a local folder or hub id; safetensors only.
            slot: the expert's place in the checkpoint.
            device: a torch device.
            dtype: "float32", "float16", "bfloat16", or "auto" for that of the stored weights. The fingerprint is
                that of the stored weights in any case.

        Raises:
            ModelRejected: MODEL_NOT_FOUND, MODEL_UNSUPPORTED, MODEL_BROKEN or VOCABULARY_MISMATCH, naming the model.
        """
        if isinstance(source, str):
            source = ExpertSource(model=source)
        loaded = load_model(source.model, device=str(device))
        facts, model = loaded.facts, loaded.model
        if dtype != "auto":
            model = model.to(DTYPES[dtype])
        model.requires_grad_(False)
        use_plain_attention(model)
        record = ExpertRecord(
            slot=slot,
            name=source.name or PurePath(source.model).name,
            tokenizer_fingerprint=facts.tokenizer_fingerprint,
            logits_width=facts.logits_width,
            weights_fingerprint=facts.weights_fingerprint,
        )
        head = VocabularyHead.of(model, facts.logits_width)
        return cls(model, loaded.tokenizer, record, head, facts.max_context_tokens)

    @torch.no_grad()
    def hidden(self, ids: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Final hidden states ``[B, L, H]`` of token ids ``[B, L]``, padded on the right with any id.

        Args:
            ids: token ids on any device.
            lengths: ``[B]`` tokens of each row; hidden states of the padding beyond become 0. None = no padding.
        """
        ids = ids.to(self.model.device, torch.long)
        with torch.autocast(self.model.device.type, enabled=False):
            hidden = final_hidden(self.model, ids)
        if lengths is not None:
            columns = torch.arange(ids.shape[1], device=ids.device)
            hidden = hidden.masked_fill((columns >= lengths.to(ids.device)[:, None])[:, :, None], 0)
        return hidden


def load_experts(
    experts: Mapping[str, ExpertSource | str], device: str | torch.device = "cpu", dtype: str = "auto"
) -> list[FrozenModel]:
    """Loads all experts, in their order by slot as given.

    Raises:
        ModelRejected: as `FrozenModel.load`; VOCABULARY_MISMATCH where two do not share their vocabulary, naming both.
    """
    loaded = [FrozenModel.load(source, slot, device, dtype) for slot, source in experts.items()]
    for other in loaded[1:]:
        check_same_vocabulary(loaded[0].record, other.record)
    return loaded


def check_same_vocabulary(first: ExpertRecord, other: ExpertRecord) -> None:
    """Raises ModelRejected (VOCABULARY_MISMATCH), naming both, unless each token id means the same to both."""
    for fact in ("logits_width", "tokenizer_fingerprint"):
        mine, theirs = getattr(first, fact), getattr(other, fact)
        if mine != theirs:
            raise ModelRejected(
                Reason.VOCABULARY_MISMATCH,
                f"experts {first.slot!r} ({first.name}) and {other.slot!r} ({other.name}) do not share a vocabulary: "
                f"{fact} {mine} and {theirs}",
            )


def use_plain_attention(model: PreTrainedModel) -> None:
    """Attention over whole rows instead of the engine's: fused, or eager where the family has soft-capped scores."""
    try:
        model.set_attn_implementation("sdpa")
    except ValueError:
        model.set_attn_implementation("eager")
