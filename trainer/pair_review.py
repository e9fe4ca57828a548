"""A look at preference pairs before anything is trained on them: their bias, said aloud and written down."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import structlog
import torch
from numpy.typing import NDArray
from torch import Tensor

from fusionroute.errors import InvalidRequest, Reason
from fusionroute.router_model import load_checkpoint
from fusionroute.vocabulary import load_tokenizer
from trainer.config import DataTable, LabelsTable, PairsJob
from trainer.data import load_pairs
from trainer.frozen_models import FrozenModel
from trainer.labelling import label_rows
from trainer.pace import Pace
from trainer.pair_bias import BiasStatistics, pair_bias, render_histogram
from trainer.report.records import BIAS_FILE
from trainer.rows import RowSet
from trainer.run_context import RunContext, RunProgress
from trainer.target_states import states_at_targets

BIAS_TEXT_FILE = "bias.txt"
ROWS_AT_A_TIME = 256
STAGE = "bias"

log = structlog.get_logger(__name__)


def announce_bias(statistics: BiasStatistics, context: RunContext) -> dict[str, Any]:
    """Tells the histogram as a note and writes `bias.json` (for the report) and `bias.txt` into the run's folder.

    Returns:
        The statistics without the histograms, for a manifest.
    """
    facts = statistics.to_json()
    text = render_histogram(statistics)
    (context.folder / BIAS_FILE).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    (context.folder / BIAS_TEXT_FILE).write_text(text + "\n", encoding="utf-8")
    context.report(RunProgress(STAGE, len(statistics.bias), len(statistics.bias), note=text))
    return {name: value for name, value in facts.items() if not name.endswith("_histogram")}


def review_pairs(config: PairsJob, checkpoint_folder: Path, context: RunContext) -> dict[str, Any]:
    """The bias of the pairs in `config.output` under the checkpoint's routes and `config.experts`; see `announce_bias`.

    Raises:
        InvalidRequest: EXPERTS_MISMATCH, the experts are not the slots of the checkpoint in its order.
        FusionRouteError: models or data cannot be loaded.
        Stopped: the context asked for it.
    """
    checkpoint = load_checkpoint(checkpoint_folder)
    if tuple(config.experts) != checkpoint.manifest.slots:
        raise InvalidRequest(
            Reason.EXPERTS_MISMATCH,
            f"experts are {', '.join(config.experts)}, but the checkpoint's slots are "
            f"{', '.join(checkpoint.manifest.slots)}, in this order",
        )
    table = config.data.model_copy(update={"max_rows": None, "overlong": "truncate"})
    pairs = load_pairs(_of_file(table, config.output), load_tokenizer(str(checkpoint_folder)), context)
    labels, _ = label_rows(pairs.rows, config.experts, LabelsTable(), context)
    router = FrozenModel.load(str(checkpoint_folder), "router")
    routes = routes_at_targets(router, checkpoint.heads.to_scores(), len(config.experts), pairs.rows, context)
    return announce_bias(pair_bias(labels, pairs, routes, beta=config.beta), context)


def routes_at_targets(
    router: FrozenModel,
    scores: Callable[[Tensor], Tensor],
    num_experts: int,
    rows: RowSet,
    context: RunContext,
) -> NDArray[np.int32]:
    """``[T]`` index of the expert that each target is routed to, k(p) = argmax of the routing scores.

    Args:
        scores: from hidden states ``[t, H]`` to ``[t, >= n]``, of which the first n columns are the routing head's.
    """
    routes = []
    pace, quiet = Pace(context, STAGE, len(rows)), RunContext(context.folder, stop=context.stop)
    for first in range(0, len(rows), ROWS_AT_A_TIME):
        some = RowSet.of(rows[index] for index in range(first, min(first + ROWS_AT_A_TIME, len(rows))))
        states = states_at_targets(router, some, quiet, stage=STAGE)
        with torch.no_grad():
            routes.append(scores(states)[:, :num_experts].argmax(dim=1).to(torch.int32).numpy())
        pace.advance(len(some))
    return np.concatenate(routes) if routes else np.empty(0, dtype=np.int32)


def _of_file(table: DataTable, path: Path) -> DataTable:
    return table.model_copy(update={"files": (path,), "dataset": "", "subset": ""})
