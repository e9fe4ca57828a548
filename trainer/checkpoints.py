"""From a trained causal LM and its heads to a router checkpoint whose manifest says where it comes from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fusionroute import __version__
from fusionroute.errors import Reason, TrainingFailed
from fusionroute.router_model import (
    COMPLETE_FILE,
    HEAD_FILE,
    ExpertRecord,
    Heads,
    Manifest,
    RouterCheckpoint,
    load_checkpoint,
    save_checkpoint,
)
from fusionroute.vocabulary import logits_width, tokenizer_fingerprint
from trainer.frozen_models import FrozenModel, check_same_vocabulary
from trainer.run_context import RunResult

CHECKPOINT_FOLDER = "checkpoint"
TRAINED_FOLDER = "trained"


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


def check_vocabulary(router: ExpertRecord, experts: Sequence[ExpertRecord]) -> None:
    """Raises ModelRejected (VOCABULARY_MISMATCH) unless router and experts share one vocabulary."""
    for expert in experts:
        check_same_vocabulary(router, expert)


def load_trained(folder: Path, device: str) -> tuple[FrozenModel, Heads]:
    """What the training loop has left in the folder of a run: the router, frozen, and the heads that learnt with it."""
    from safetensors.torch import load_file

    trained = folder / TRAINED_FOLDER
    tensors = load_file(trained / HEAD_FILE)
    heads = Heads.from_tensors(tensors, *tensors["routing.weight"].shape)
    return FrozenModel.load(str(trained), "router", device), heads


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
    chat_template: str | None = None,
) -> Path:
    """Writes `<folder>/checkpoint`, complete or not at all, and returns it.

    Args:
        chat_template: with which the conversations were rendered, so that prompts will be; None = the tokenizer's.
    """
    tokenizer = router.tokenizer
    if chat_template is not None:
        tokenizer.chat_template = chat_template
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


def finished(folder: Path) -> RunResult | None:
    """The result of an earlier attempt of a run, if it came so far."""
    target = folder / CHECKPOINT_FOLDER
    if not (target / COMPLETE_FILE).is_file():
        return None
    return RunResult(target, is_checkpoint=True, metrics=load_checkpoint(target).manifest.metrics)
