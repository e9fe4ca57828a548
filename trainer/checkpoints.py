"""From a trained causal LM and its heads to a router checkpoint whose manifest says where it comes from."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fusionroute import __version__
from fusionroute.errors import ModelRejected, Reason, TrainingFailed
from fusionroute.router_model import (
    COMPLETE_FILE,
    ExpertRecord,
    Heads,
    Manifest,
    RouterCheckpoint,
    load_checkpoint,
    save_checkpoint,
)
from fusionroute.vocabulary import load_tokenizer, logits_width, tokenizer_fingerprint
from trainer.frozen_models import FrozenModel

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CHECKPOINT_FOLDER = "checkpoint"


def parent_checkpoint(folder: str, experts: Sequence[ExpertRecord]) -> RouterCheckpoint:
    """The checkpoint that a run starts from, if it routes for these experts.

    Args:
        experts: in the order of the configuration; the checkpoint's must be the first of them, in this order.

    Raises:
        ModelRejected: it cannot be loaded.
        TrainingFailed: EXPERTS_MISMATCH, naming the slot and both fingerprints.
    """
    checkpoint = load_checkpoint(folder)
    known = checkpoint.manifest.experts
    wanted, given = [e.slot for e in known], [e.slot for e in experts[: len(known)]]
    if wanted != given:
        raise TrainingFailed(
            Reason.EXPERTS_MISMATCH,
            f"the checkpoint {folder!r} routes for {', '.join(wanted)} in this order, "
            f"the configuration has {', '.join(e.slot for e in experts)}",
        )
    for mine, theirs in zip(known, experts, strict=False):
        if mine.weights_fingerprint != theirs.weights_fingerprint:
            raise TrainingFailed(
                Reason.EXPERTS_MISMATCH,
                f"expert {mine.slot!r} has weights {theirs.weights_fingerprint}, the checkpoint {folder!r} "
                f"was trained with {mine.weights_fingerprint}",
            )
    return checkpoint


def check_vocabulary(router: str, experts: Sequence[ExpertRecord]) -> PreTrainedTokenizerBase:
    """The router's tokenizer, which must be that of the experts. Raises ModelRejected: VOCABULARY_MISMATCH."""
    tokenizer = load_tokenizer(router)
    mine = (tokenizer_fingerprint(tokenizer), logits_width(tokenizer))
    for expert in experts:
        if (expert.tokenizer_fingerprint, expert.logits_width) != mine:
            raise ModelRejected(
                Reason.VOCABULARY_MISMATCH,
                f"expert {expert.slot!r} has tokenizer {expert.tokenizer_fingerprint} of width "
                f"{expert.logits_width}, the router {router!r} has {mine[0]} of width {mine[1]}",
            )
    return tokenizer


def write_checkpoint(
    folder: Path,
    router: FrozenModel,
    heads: Heads,
    experts: Sequence[ExpertRecord],
    *,
    combine: str,
    lineage: Mapping[str, Any],
    switches: Mapping[str, Any],
    metrics: Mapping[str, Any],
) -> Path:
    """Writes `<folder>/checkpoint`, complete or not at all, and returns it."""
    tokenizer = router.tokenizer
    manifest = Manifest(
        experts=tuple(experts),
        combine=combine,
        tokenizer_fingerprint=tokenizer_fingerprint(tokenizer),
        logits_width=logits_width(tokenizer),
        lineage=dict(lineage),
        switches=dict(switches),
        metrics=dict(metrics),
        code_version=__version__,
    )
    target = folder / CHECKPOINT_FOLDER
    save_checkpoint(target, router.model, tokenizer, heads, manifest)
    return target


def finished_checkpoint(folder: Path) -> Path | None:
    """What an earlier attempt of the run has completed, if it came so far."""
    target = folder / CHECKPOINT_FOLDER
    return target if (target / COMPLETE_FILE).is_file() else None


def discard(folder: Path) -> None:
    """Remove a folder that is no longer needed."""
    shutil.rmtree(folder, ignore_errors=True)
