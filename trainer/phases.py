"""What phase I and phase II share: labelled lessons, the report, who was right."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import structlog
from torch import Tensor

from fusionroute.router_model import ExpertRecord, Heads
from trainer.config import ExpertSource, LabelsTable, ReportTable
from trainer.frozen_models import FrozenModel, load_experts
from trainer.labelling import label_rows
from trainer.ownership import measure_ownership
from trainer.report import write_report
from trainer.report.records import OWNERSHIP_FILE
from trainer.rows import Labels, RowSet
from trainer.run_context import RunContext, RunProgress
from trainer.target_states import TargetSample

INPUTS = "inputs"
"""Where the loop finds what it learns from, in the folder of the run."""

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


def report_run(
    table: ReportTable,
    given: Labelled,
    router: FrozenModel,
    heads: Heads,
    sources: Mapping[str, ExpertSource],
    device: str,
    seed: int,
    context: RunContext,
) -> dict[str, Any]:
    """Who was right, and the picture of the run; what of it belongs into the manifest."""
    if not table.enabled:
        return {}
    context.report(RunProgress("report", 0, 1))
    facts: dict[str, Any] = {}
    if given.rows.num_targets > 0:
        experts = load_experts(sources, device)
        rows = _some_rows(given, table.max_rows, seed)
        ownership = measure_ownership(rows, router, routing_scores(heads, device), experts, context)
        facts = {"ownership": ownership.to_json()}
        text = json.dumps(facts["ownership"], indent=2) + "\n"
        (context.folder / OWNERSHIP_FILE).write_text(text, encoding="utf-8")
    picture = write_report(context.folder)
    log.info("report", picture=str(picture))
    context.report(RunProgress("report", 1, 1))
    return facts


def routing_scores(heads: Heads, device: str) -> Callable[[Tensor], Tensor]:
    """The routing head alone, from hidden states ``[T, H]`` to scores ``[T, n]``."""
    return Heads(heads.routing_weight, heads.routing_bias).to_scores(device)


def _some_rows(given: Labelled, max_rows: int, seed: int) -> RowSet:
    mean_targets = given.rows.num_targets / max(1, len(given.rows))
    return TargetSample.draw(given.rows, given.labels, round(max_rows * mean_targets), seed).rows


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
