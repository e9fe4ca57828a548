"""What the frozen experts say about every target: asked once, kept on disk, found again by its key."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
import structlog

from fusionroute.errors import InvalidRequest, Reason
from fusionroute.router_model import ExpertRecord
from fusionroute.vocabulary import load_tokenizer
from trainer.config import ExpertSource, LabelJob, LabelsTable
from trainer.label_key import LabelKey, cached_folder
from trainer.label_store import LabelStore
from trainer.pace import Pace
from trainer.rows import Labels, RowSet
from trainer.run_context import RunContext, RunResult

if TYPE_CHECKING:
    from trainer.label_sources import LabelSource

STAGE = "labels"
TEXTS = "texts"
"""Where the labels of texts lie within a folder that a configuration names."""

log = structlog.get_logger(__name__)


def label_rows(
    rows: RowSet, experts: Mapping[str, ExpertSource], table: LabelsTable, context: RunContext
) -> tuple[Labels, tuple[ExpertRecord, ...]]:
    """The experts' labels of all targets: those that are there already, else computed now.

    A run that was killed is continued where its last shard ended. With ``source = "services"`` the experts are
    those that serve the slots; the configured models are not loaded.

    Args:
        rows: T targets in all.
        experts: by slot; their order is that of the columns.
        table: where labels lie and who gives them.
        context: is told how far it is, and may stop it.

    Returns:
        Labels ``[T, n]``, memory-mapped, and the experts that gave them.

    Raises:
        TrainingFailed: LABELS_STALE, the named folder holds labels of other rows or experts.
        ModelRejected: an expert cannot be loaded, or two have different vocabularies.
        InvalidRequest: CONTEXT_FULL, a row is longer than an expert can read; TOKEN_OUT_OF_RANGE; DATA_INVALID,
            there is no target.
        Unavailable: a service could not be reached for too long.
        Stopped: `context` was asked to stop; the shards that are written stay.
    """
    if not rows.num_targets:
        raise InvalidRequest(
            Reason.DATA_INVALID, "the data has no token to be learnt, so there is nothing to label"
        )
    source = _source(experts, table)
    records = source.find_experts(context.stop)
    _check_ids(rows, records)
    key = LabelKey.of(rows, records)
    store = LabelStore(table.folder or cached_folder(key), key, rows, table.rows_per_shard)
    if not store.is_complete:
        with store.locked(context.stop.check):
            if not store.is_complete:
                _label(store, rows, source, context)
    log.info("labels", folder=str(store.folder), targets=key.num_targets, experts=", ".join(key.slots))
    return store.read(), records


def find_experts(
    experts: Mapping[str, ExpertSource], table: LabelsTable, context: RunContext
) -> tuple[ExpertRecord, ...]:
    """Which experts would label, in the order of the configuration, without asking them anything yet.

    Raises as `label_rows`.
    """
    return _source(experts, table).find_experts(context.stop)


def run_label(config: LabelJob, context: RunContext) -> RunResult:
    """`fusionroute train label`: labels of texts, for later runs to find.

    Texts are rendered with the tokenizer of the first expert. Raises as `load_texts` and `label_rows`.
    """
    from trainer.data import load_texts

    tokenizer = load_tokenizer(next(iter(config.experts.values())).model)
    rows = load_texts(config.data, tokenizer, context)
    table = config.labels
    if table.folder is not None:
        table = table.model_copy(update={"folder": table.folder / TEXTS})
    labels, records = label_rows(rows, config.experts, table, context)
    folder = table.folder or cached_folder(LabelKey.of(rows, records))
    return RunResult(folder, is_checkpoint=False, metrics=_metrics(rows, labels, records))


def _source(experts: Mapping[str, ExpertSource], table: LabelsTable) -> LabelSource:
    if table.source == "services":
        from trainer.service_labels import ServiceLabels

        return ServiceLabels(tuple(experts), table.router, table.concurrency)
    from trainer.local_labels import LocalLabels

    return LocalLabels(experts, table.batch_tokens)


def _label(store: LabelStore, rows: RowSet, source: LabelSource, context: RunContext) -> None:
    store.begin()
    pending = {slot: store.pending(slot) for slot in store.key.slots}
    missing = sum(span.num_targets for spans in pending.values() for span in spans)
    num_labels = store.key.num_targets * len(store.key.slots)
    pace = Pace(context, STAGE, num_labels, done=num_labels - missing)
    source.label(rows, pending, store, pace, context.stop)
    store.finish()


def _check_ids(rows: RowSet, records: tuple[ExpertRecord, ...]) -> None:
    width = records[0].logits_width
    highest = int(rows.ids.max()) if len(rows.ids) else 0
    if highest >= width:
        raise InvalidRequest(
            Reason.TOKEN_OUT_OF_RANGE,
            f"the rows contain token {highest}; ids of the experts go from 0 to {width - 1}",
            metadata={"field": "data", "limit": str(width - 1)},
        )


def _metrics(rows: RowSet, labels: Labels, records: tuple[ExpertRecord, ...]) -> dict[str, float]:
    """How many targets, how many of them the experts dispute, and how well each expert knows them."""
    disagree = (labels.argmax_ids != labels.argmax_ids[:, :1]).any(axis=1)
    means = [float(np.mean(labels.gold_logprobs[:, k], dtype=np.float64)) for k in range(len(records))]
    return {
        "rows": float(len(rows)),
        "targets": float(rows.num_targets),
        "informative_share": float(disagree.mean()),
        **{f"gold_logprob/{record.slot}": mean for record, mean in zip(records, means, strict=True)},
    }
