"""Phase II (method section 3): preference pairs mixed with SFT rows, from a checkpoint of phase I.

The reference is that checkpoint's router alone: its log-probabilities are computed once, so that no second model
stays in memory. The bias of the pairs is told before anything is trained.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fusionroute.router_model import Heads
from trainer.checkpoints import check_vocabulary, finished, load_trained, parent_checkpoint, write_checkpoint
from trainer.config import CdpoJob
from trainer.data import load_pairs, load_texts
from trainer.data.rendering import read_chat_template
from trainer.devices import device_of
from trainer.frozen_models import FrozenModel
from trainer.gates import gate_facts
from trainer.labelling import find_experts
from trainer.loop import train_loop
from trainer.loop_inputs import LoopInputs, PairLesson, SftLesson, measure_reference
from trainer.pace import Pace
from trainer.pair_bias import pair_bias
from trainer.pair_review import announce_bias
from trainer.phases import INPUTS, data_facts, labelled, lasting, report_run, switches_of, with_gates
from trainer.router_module import RouterModule
from trainer.rows import Labels, PairSet
from trainer.run_context import RunContext, RunResult
from trainer.training_state import COMPLETE_FILE


def run_cdpo(config: CdpoJob, context: RunContext) -> RunResult:
    """From a router of phase I, texts and pairs to a router checkpoint, its gates fitted anew.

    Raises:
        FusionRouteError: naming what is wrong with data, models, labels or disk; EXPERTS_MISMATCH where the
            checkpoint was made for other experts.
        Stopped: the context asked for it.
    """
    if (done := finished(context.folder)) is not None:
        return done
    device = device_of(config.training.device)
    start = FrozenModel.load(config.router, "router")
    parent, tokenizer = start.record, start.tokenizer
    del start
    experts = find_experts(config.experts, config.labels, context)
    check_vocabulary(parent, experts)
    checkpoint = parent_checkpoint(config.router, experts)
    rows, pairs = load_texts(config.data, tokenizer, context), load_pairs(config.pairs, tokenizer, context)
    of_texts = labelled(rows, config.experts, config.labels, "texts", context)
    of_pairs = labelled(pairs.rows, config.experts, config.labels, "pairs", context)
    reference = _reference(config, checkpoint.heads, pairs, device, context)
    bias = _tell_bias(config, of_pairs.labels, pairs, reference.routes, context)
    lesson = PairLesson(pairs, of_pairs.labels, reference.logprobs, reference.routes)
    inputs = LoopInputs(config, config.router, SftLesson(rows, of_texts.labels), lesson)
    inputs.save(context.folder / INPUTS)
    outcome = train_loop(context.folder, context)
    router, routing = load_trained(context.folder, device)
    heads, of_gates = with_gates(config, of_texts, router, routing, device, context)
    facts = report_run(config, of_texts, router, heads, device, context)
    metrics = {**bias, **outcome.metrics, **of_gates}
    written = write_checkpoint(
        context.folder,
        router,
        heads,
        of_texts.experts,
        combine=config.combine,
        lineage={
            "phase": "cdpo",
            "parent": Path(config.router).name,
            "parent_fingerprint": checkpoint.fingerprint(parent.weights_fingerprint),
            "grandparents": checkpoint.manifest.lineage,
            "data": data_facts(texts=(config.data, rows), pairs=(config.pairs, pairs.rows)),
        },
        switches=_switches(config, heads),
        metrics=lasting(metrics) | facts,
        chat_template=read_chat_template(config.data),
    )
    return RunResult(written, is_checkpoint=True, metrics=metrics)


@dataclass(frozen=True, slots=True)
class Reference:
    """What the router of phase I says about the pairs.

    Attributes:
        logprobs: ``[2 N]`` float32, of whole answers.
        routes: ``[T]`` int32, the expert at each target.
    """

    logprobs: NDArray[np.float32]
    routes: NDArray[np.int32]


def _reference(
    config: CdpoJob, heads: Heads, pairs: PairSet, device: str, context: RunContext
) -> Reference:
    """In the precision of the training, so that the log-ratios of step 0 are 0; an earlier attempt's is kept."""
    if (known := _known_reference(context.folder, pairs)) is not None:
        return known
    routing = (heads.routing_weight, heads.routing_bias)
    router = RouterModule.load(config.router, len(config.experts), config.training, routing, device)
    pace = Pace(context, "reference", len(pairs.rows))
    return Reference(*measure_reference(router, pairs, config.training.chunk_tokens, pace.advance))


def _known_reference(folder: Path, pairs: PairSet) -> Reference | None:
    if not (folder / INPUTS / COMPLETE_FILE).is_file():
        return None
    lesson = LoopInputs.load(folder / INPUTS).pairs
    if lesson is None or lesson.pairs.rows.digest != pairs.rows.digest:
        return None
    # copies: the files that are mapped here are about to be written anew
    return Reference(np.array(lesson.reference_logprobs), np.array(lesson.phase_one_routes))


def _tell_bias(
    config: CdpoJob, labels: Labels, pairs: PairSet, routes: NDArray[np.int32], context: RunContext
) -> dict[str, float]:
    """Says what the experts think of the pairs before anything is trained, and warns where they teach little."""
    cdpo = config.cdpo
    bias = pair_bias(
        labels,
        pairs,
        routes,
        beta=cdpo.beta,
        bias_scale=cdpo.bias_scale,
        bias_reduction=cdpo.bias_reduction,
    )
    announce_bias(bias, context)
    return {"bias/mean_at_start": bias.mean, "sigmoid_neg_margin/mean_at_start": bias.mean_sigmoid}


def _switches(config: CdpoJob, heads: Heads) -> dict[str, Any]:
    return {
        **switches_of(config, "sft", "cdpo", "mixed", "training"),
        "gates": gate_facts(config.gates, heads),
    }
