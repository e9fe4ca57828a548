"""From nothing to the page: every seed trained, served and asked, then told together."""

from __future__ import annotations

import json
import logging
import multiprocessing
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import structlog
import torch
from transformers import AutoTokenizer
from transformers.utils.logging import disable_progress_bar

from benchmarks.real_text.asking import Serve, held_out_texts, judge_all, outcomes_of, serve_processes
from benchmarks.real_text.findings import findings_of
from benchmarks.real_text.models import Family, prepare_base
from benchmarks.real_text.page import write_page
from benchmarks.real_text.sizes import Sizes
from benchmarks.real_text.texts import Source, texts_of
from evaluation.questions import Outcome

COMMAND = "nice -n 5 python -m benchmarks.real_text --output docs/results"


@dataclass(frozen=True, slots=True)
class Plan:
    """What is done.

    Attributes:
        work: where models and answers are kept; of these sizes only.
        processes: seeds at a time, each in a process of its own.
        phase_two: whether pairs are collected and CDPO is trained and asked.
        serve: how a stack is started; used where there is one process.
    """

    source: Source
    sizes: Sizes
    seeds: tuple[int, ...]
    work: Path
    processes: int = 1
    phase_two: bool = True
    serve: Serve = serve_processes


def run_all(plan: Plan, output: Path) -> Path:
    """Returns the page.

    Raises:
        ValueError: the work folder holds models of other sizes, or a domain has too few rows.
        FusionRouteError: as services and jobs do.
    """
    _claim(plan)
    prepare_base(plan.source, plan.work)
    if plan.processes > 1:
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(plan.processes, context) as pool:
            found = list(pool.map(run_seed, [plan] * len(plan.seeds), plan.seeds))
    else:
        found = [run_seed(plan, seed) for seed in plan.seeds]
    outcomes = [outcome for of_seed in found for outcome in of_seed]
    one = [each for each in found[0] if each.system == "base"]
    facts = {
        "command": COMMAND if plan.phase_two else f"{COMMAND} --phase-one",
        "seeds": list(plan.seeds),
        "sizes": plan.sizes.to_json(),
        "tokens": sum(each.answer.num_tokens for each in one),
        "torch": torch.__version__,
    }
    return write_page(findings_of(outcomes, facts), output)


def run_seed(plan: Plan, seed: int) -> list[Outcome]:
    """All outcomes of a seed."""
    torch.set_num_threads(1)
    disable_progress_bar()
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING))
    began = time.process_time()

    def tell(what: str) -> None:
        print(f"seed {seed}, {time.process_time() - began:.0f} CPU s: {what}", flush=True)

    base = prepare_base(plan.source, plan.work)
    tokenizer = AutoTokenizer.from_pretrained(base)
    texts = texts_of(plan.source, plan.sizes, seed, tokenizer)
    family = Family(plan.work / f"seed-{seed}", base, plan.sizes, seed, texts, tell)
    family.train_experts()
    family.train_sft()
    asked = held_out_texts(family, tokenizer)
    return list(outcomes_of(judge_all(family, asked, plan.serve, phase_two=plan.phase_two), asked, seed))


def _claim(plan: Plan) -> None:
    """Models of other sizes must not be taken for these."""
    note, sizes = plan.work / "sizes.json", json.dumps(plan.sizes.to_json(), indent=1)
    plan.work.mkdir(parents=True, exist_ok=True)
    if note.exists() and note.read_text(encoding="utf-8") != sizes:
        raise ValueError(f"{plan.work} holds models of other sizes ({note}): give another --work")
    note.write_text(sizes, encoding="utf-8")
