"""Phase I (method section 2): labels, router and routing head on L_SFT, then the gates, then the checkpoint."""

from __future__ import annotations

from fusionroute.router_model import Heads
from trainer.checkpoints import check_vocabulary, finished, load_trained, parent_checkpoint, write_checkpoint
from trainer.config import SftJob
from trainer.data import load_texts
from trainer.data.rendering import read_chat_template
from trainer.devices import device_of
from trainer.frozen_models import FrozenModel
from trainer.gates import gate_facts
from trainer.labelling import find_experts
from trainer.loop import train_loop
from trainer.loop_inputs import LoopInputs, SftLesson
from trainer.phases import INPUTS, data_facts, labelled, lasting, report_run, switches_of, with_gates
from trainer.run_context import RunContext, RunResult


def run_sft(config: SftJob, context: RunContext) -> RunResult:
    """From frozen experts and texts to a router checkpoint.

    Raises:
        FusionRouteError: naming what is wrong with data, models, labels or disk.
        Stopped: the context asked for it.
    """
    if (done := finished(context.folder)) is not None:
        return done
    device = device_of(config.training.device)
    # what cannot be trained is found before the labels are made
    start = FrozenModel.load(config.router, "router")
    parent, tokenizer = start.record, start.tokenizer
    del start
    experts = find_experts(config.experts, config.labels, context)
    check_vocabulary(parent, experts)
    if config.routing == "kept":
        parent_checkpoint(config.router, experts)
    rows = load_texts(config.data, tokenizer, context)
    given = labelled(rows, config.experts, config.labels, "texts", context)
    LoopInputs(config, config.router, SftLesson(rows, given.labels)).save(context.folder / INPUTS)
    outcome = train_loop(context.folder, context)
    router, routing = load_trained(context.folder, device)
    heads, of_gates = with_gates(config, given, router, routing, device, context)
    metrics = {**outcome.metrics, **of_gates}
    facts = report_run(config, given, router, heads, device, context)
    checkpoint = write_checkpoint(
        context.folder,
        router,
        heads,
        given.experts,
        combine=config.combine,
        lineage={
            "phase": "sft",
            "parent": parent.name,
            "parent_weights_fingerprint": parent.weights_fingerprint,
            "data": data_facts(texts=(config.data, rows)),
        },
        switches=_switches(config, heads),
        metrics=lasting(metrics) | facts,
        chat_template=read_chat_template(config.data),
    )
    return RunResult(checkpoint, is_checkpoint=True, metrics=metrics)


def _switches(config: SftJob, heads: Heads) -> dict[str, object]:
    return {**switches_of(config, "sft", "training", "routing"), "gates": gate_facts(config.gates, heads)}
