"""Loading a router checkpoint for serving: its causal LM with the heads attached, held against its manifest."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import structlog

from fusionroute.engine import LoadedModel, load_model
from fusionroute.errors import ModelRejected, Reason
from fusionroute.router_model import RouterCheckpoint, load_checkpoint

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class LoadedRouter:
    """A checkpoint in memory, ready for an engine."""

    checkpoint: RouterCheckpoint
    model: LoadedModel

    @property
    def fingerprint(self) -> str:
        """Of weights, heads and manifest in the number format in which the model is loaded."""
        return self.checkpoint.fingerprint(self.model.facts.weights_fingerprint)


def load_router(folder: str | Path, *, dtype: str = "auto", device: str = "cpu") -> LoadedRouter:
    """The checkpoint in `folder` and its model.

    Raises:
        ModelRejected: naming folder and fault; VOCABULARY_MISMATCH when model and manifest differ.
    """
    started = time.monotonic()
    checkpoint = load_checkpoint(folder)
    model = load_model(str(folder), dtype=dtype, device=device, heads=checkpoint.heads.to_scores(device))
    for field in ("tokenizer_fingerprint", "logits_width"):
        got, wanted = getattr(model.facts, field), getattr(checkpoint.manifest, field)
        if got != wanted:
            raise ModelRejected(
                Reason.VOCABULARY_MISMATCH,
                f"{str(folder)!r}: the router has {field} {got}, its manifest says {wanted}",
            )
    log.info(
        "checkpoint_loaded",
        checkpoint=str(folder),
        slots=list(checkpoint.manifest.slots),
        combine=checkpoint.manifest.combine,
        seconds=round(time.monotonic() - started, 3),
    )
    return LoadedRouter(checkpoint, model)
