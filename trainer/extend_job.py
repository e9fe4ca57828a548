"""The job that gives an existing router one more expert (`fusionroute train extend`)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fusionroute.errors import invalid
from trainer.checkpoints import check_vocabulary, finished, parent_checkpoint, write_checkpoint
from trainer.config import ExtendJob
from trainer.data import load_texts
from trainer.devices import device_of
from trainer.extend import Domain, effect_note, extend_heads
from trainer.frozen_models import FrozenModel
from trainer.gates_table import GatesTable
from trainer.labelling import find_experts
from trainer.phases import Labelled, data_facts, labelled, switches_of
from trainer.run_context import RunContext, RunProgress, RunResult

EFFECT_FILE = "extension.json"


def run_extend(config: ExtendJob, context: RunContext) -> RunResult:
    """From a checkpoint for n experts to one for n + 1; the causal LM stays as it is, byte for byte.

    Raises:
        InvalidRequest: the configuration does not name exactly one expert more than the checkpoint.
        FusionRouteError: naming what is wrong with data, models, labels or disk.
        Stopped: the context asked for it.
    """
    if (done := finished(context.folder)) is not None:
        return done
    device = device_of(config.device)
    router = FrozenModel.load(config.router, "router", device)
    experts = find_experts(config.experts, config.labels, context)
    check_vocabulary(router.record, experts)
    checkpoint = parent_checkpoint(config.router, experts)
    num_known = len(checkpoint.manifest.experts)
    if len(experts) != num_known + 1:
        limit = f"{num_known + 1} experts: those of the checkpoint in their order and one more"
        raise invalid("experts", [expert.slot for expert in experts], limit)
    tables = {"texts": config.data, **({"old_texts": config.old_data} if config.old_data else {})}
    given: dict[str, Labelled] = {}
    for name, table in tables.items():
        rows = load_texts(table, router.tokenizer, context)
        given[name] = labelled(rows, config.experts, config.labels, name, context)
    domains = {
        name: Domain.of(
            router, each.rows, each.labels, config.max_targets, config.seed, context, f"states: {name}"
        )
        for name, each in given.items()
    }
    heads, effect = extend_heads(
        checkpoint.heads, domains["texts"], domains.get("old_texts"), _schedule(config), config.seed, context
    )
    text = json.dumps(effect, indent=2) + "\n"
    (context.folder / EFFECT_FILE).write_text(text, encoding="utf-8")
    note = effect_note(effect, experts[-1].slot)
    context.report(RunProgress("extend", config.num_steps, config.num_steps, note=note))
    written = write_checkpoint(
        context.folder,
        router,
        heads,
        experts,
        combine=checkpoint.manifest.combine,
        lineage={
            "phase": "extend",
            "parent": Path(config.router).name,
            "parent_fingerprint": checkpoint.fingerprint(router.record.weights_fingerprint),
            "grandparents": checkpoint.manifest.lineage,
            "data": data_facts(**{name: (tables[name], each.rows) for name, each in given.items()}),
        },
        switches=_switches(config, checkpoint.manifest.switches),
        metrics=effect,
    )
    return RunResult(written, is_checkpoint=True, metrics=effect)


def _schedule(config: ExtendJob) -> GatesTable:
    return GatesTable(
        num_steps=config.num_steps, batch_targets=config.batch_targets, learning_rate=config.learning_rate
    )


def _switches(config: ExtendJob, before: dict[str, Any]) -> dict[str, Any]:
    mine = switches_of(config, "num_steps", "batch_targets", "learning_rate", "max_targets", "seed")
    return {**before, "extend": mine}
