"""What phase I and phase II share: labelled lessons, the report, who was right."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import structlog

from fusionroute.router_model import ExpertRecord, Heads
from trainer.config import CdpoJob, ExpertSource, LabelsTable, SftJob
from trainer.frozen_models import FrozenModel, load_experts
from trainer.gates import train_gates
from trainer.labelling import label_rows
from trainer.ownership import measure_ownership
from trainer.report import write_report
from trainer.report.records import OWNERSHIP_FILE
from trainer.rows import Labels, RowSet
from trainer.run_context import RunContext, RunProgress
from trainer.target_states import TargetSample

INPUTS = "inputs"
"""Where the loop finds what it learns from, in the folder of the run."""

_OF_THE_MACHINE = ("tokens_per_second",)

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Labelled:
    """Rows with what the experts say about them, and which experts they were."""

    rows: RowSet
    labels: Labels
    experts: tuple[ExpertRecord, ...]


def labelled(
    rows: RowSet,
    experts: Mapping[str, ExpertSource],
    table: LabelsTable,
    name: str,
    context: RunContext,
) -> Labelled:
    """Labels from the cache, from an earlier attempt, or computed now.

    Args:
        name: of the data set, a folder within the table's folder where that is given.
    """
    own = table if table.folder is None else table.model_copy(update={"folder": table.folder / name})
    labels, records = label_rows(rows, experts, own, context)
    return Labelled(rows, labels, records)


def with_gates(
    config: SftJob | CdpoJob, given: Labelled, router: FrozenModel, routing: Heads, device: str, context: RunContext
) -> tuple[Heads, dict[str, float]]:
    """The heads with gates fitted to this router's hidden states, if they are wanted, and their last losses.

    Gates of an earlier phase are never kept: after phase II they read hidden states that have moved. One that has
    learnt with the router is of this phase.

    Args:
        routing: what the loop has trained: the routing head, and such a gate.
    """
    if not config.gates.enabled:
        return routing, {}
    load_expert = expert_loader(config.experts, device) if config.gates.sum_gate else None
    seed = config.training.seed
    return train_gates(router, routing, given.rows, given.labels, config.gates, seed, context, load_expert)


def report_run(
    config: SftJob | CdpoJob, given: Labelled, router: FrozenModel, heads: Heads, device: str, context: RunContext
) -> dict[str, Any]:
    """Who was right, and the picture of the run; what of it belongs into the manifest."""
    if not config.report.enabled:
        return {}
    context.report(RunProgress("report", 0, 1))
    facts: dict[str, Any] = {}
    if given.rows.num_targets > 0:
        experts = load_experts(config.experts, device)
        rows = _some_rows(given, config.report.max_rows, config.training.seed)
        scores = Heads(heads.routing_weight, heads.routing_bias).to_scores(device)
        ownership = measure_ownership(rows, router, scores, experts, context).to_json()
        text = json.dumps(ownership, indent=2) + "\n"
        (context.folder / OWNERSHIP_FILE).write_text(text, encoding="utf-8")
        facts = {"ownership": ownership}
    picture = write_report(context.folder, f"{config.name} {config.kind}")
    log.info("report", picture=str(picture))
    context.report(RunProgress("report", 1, 1))
    return facts


def _some_rows(given: Labelled, max_rows: int, seed: int) -> RowSet:
    mean_targets = given.rows.num_targets / max(1, len(given.rows))
    return TargetSample.draw(given.rows, given.labels, round(max_rows * mean_targets), seed).rows


def lasting(metrics: Mapping[str, float]) -> dict[str, float]:
    """Without what is of the machine and not of the checkpoint: the same run gives the same manifest."""
    return {name: value for name, value in metrics.items() if name not in _OF_THE_MACHINE}


def data_facts(**tables: tuple[Any, RowSet]) -> dict[str, Any]:
    """For the manifest's lineage: which data, how much of it, and the digest of its tokens."""
    return {
        name: {
            "files": [str(Path(path).name) for path in table.files],
            "dataset": table.dataset,
            "rows": len(rows),
            "tokens": len(rows.ids),
            "targets": rows.num_targets,
            "digest": rows.digest,
        }
        for name, (table, rows) in tables.items()
    }


def switches_of(config: Any, *tables: str) -> dict[str, Any]:
    """The tables of a configuration that decide what was learnt, as plain values."""
    values = config.model_dump(mode="json")
    return {name: values[name] for name in tables}


def expert_loader(sources: Mapping[str, ExpertSource], device: str) -> Callable[[int], FrozenModel]:
    """Loads the expert of an index when it is asked for."""
    slots: Sequence[str] = list(sources)
    return lambda index: FrozenModel.load(sources[slots[index]], slots[index], device)
