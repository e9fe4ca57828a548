"""One process for each seed: it builds the family, trains what studies need, judges; then all is written down."""

from __future__ import annotations

import json
import multiprocessing
import os
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, replace
from pathlib import Path

from benchmarks.studies.catalogue import STUDIES
from benchmarks.studies.judging import Judge
from benchmarks.studies.page import write_page
from benchmarks.studies.picture import write_picture
from benchmarks.studies.plan import Study
from benchmarks.studies.results import SeedResults, digest_of_judging, judge_of, judge_seed, results_of
from benchmarks.studies.workshop import Workshop
from trainer.lab_family import build
from trainer.lab_family.recipe import RECIPES, Recipe, Stage

PER_TASK, QUICK_PER_TASK = 60, 4


def run_studies(
    names: Sequence[str],
    size: str,
    seeds: Sequence[int],
    output: Path,
    cache_dir: Path | None = None,
    processes: int = 2,
) -> None:
    """Trains what is missing, judges, and writes a page and a picture of each study.

    Args:
        names: keys of `STUDIES`.
        size: of the lab, or ``quick``.
        seeds: each a family of its own.
        output: folder of the pages.
        cache_dir: of models, instead of ``$FUSIONROUTE_CACHE_DIR`` or ``~/.cache/fusionroute``.
        processes: that work beside each other, each at one seed.
    """
    began, cpu_seconds = time.perf_counter(), 0.0
    by_study: dict[str, dict[int, SeedResults]] = {name: {} for name in names}
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, mp_context=context, initializer=_prepare) as pool:
        waiting = {pool.submit(study_seed, names, size, seed, cache_dir): seed for seed in seeds}
        for done in as_completed(waiting):
            found, seconds = done.result()
            cpu_seconds += seconds
            for name, each in found.items():
                by_study[name][waiting[done]] = each
    write(by_study, size, output)
    wall_seconds = time.perf_counter() - began
    print(f"{len(names)} studies in {output}: {cpu_seconds:.0f} CPU s, {wall_seconds:.0f} s")


def study_seed(
    names: Sequence[str], size: str, seed: int, cache_dir: Path | None
) -> tuple[dict[str, SeedResults], float]:
    """Studies of one seed's family, which is built first where it is not there, and the CPU seconds they took."""
    began = time.process_time()

    def tell(what: str) -> None:
        print(f"seed {seed}, {time.process_time() - began:.0f} CPU s: {what}", flush=True)

    tell("family")
    family = build(size, seed, cache_dir, processes=1, recipe=recipe_of(size))
    workshop = Workshop(family, tell)
    judge = judge_of(workshop, per_task_of(size))
    found = {name: _kept(STUDIES[name], workshop, judge, per_task_of(size)) for name in names}
    return found, time.process_time() - began


def _kept(study: Study, workshop: Workshop, judge: Judge, per_task: int) -> SeedResults:
    """What an earlier run of the same code has judged, or judged now."""
    path = workshop.root / f"judged-{study.name}-{per_task}-{digest_of_judging(study)}.json"
    if path.exists():
        return SeedResults(**json.loads(path.read_text(encoding="utf-8")))
    found = judge_seed(study, judge)
    draft = path.with_suffix(f".{os.getpid()}")
    draft.write_text(json.dumps(asdict(found)), encoding="utf-8")
    draft.replace(path)
    return found


def write(by_study: dict[str, dict[int, SeedResults]], size: str, output: Path) -> None:
    """Pages and pictures of what was judged."""
    output.mkdir(parents=True, exist_ok=True)
    for name, by_seed in by_study.items():
        results = results_of(STUDIES[name], per_task_of(size), dict(sorted(by_seed.items())))
        print(write_page(results, {"size": size}, output))
        write_picture(results, output)


def recipe_of(size: str) -> Recipe:
    """Of a size of the lab, or ``quick``: models that know nothing, in seconds."""
    if size != "quick":
        return RECIPES[size]
    few = Stage(3, 4, 1e-3, 2)
    return replace(
        RECIPES["demo"], hidden_size=16, num_layers=1, num_heads=2, intermediate_size=16, base=few, expert=few,
        num_router_items=12, router=few, gates=Stage(3, 16, 1e-2, 2), num_pair_prompts=12, preferences=few,
        preference_epochs=1,
    )  # fmt: skip


def per_task_of(size: str) -> int:
    """Items of each of the 23 tasks."""
    return QUICK_PER_TASK if size == "quick" else PER_TASK


def _prepare() -> None:
    """One thread, deterministic: the same seeds give the same bytes."""
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "HF_HUB_OFFLINE"):
        os.environ[name] = "1"
    import torch

    from fusionroute.telemetry import configure_logs

    configure_logs("studies", log_format="console", log_level="error")
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
