"""Building a family once and finding it again: cached, atomic, one builder at a time.

    <cache>/lab/<digest>/           base/  experts/{math,strings,format}/  router_sft/  router/
                                    data/{router,pairs}.jsonl.gz  facts.json  COMPLETE
    <cache>/lab/<digest>.lock       held by whoever builds
    <cache>/lab/<digest>.partial-*  a build under way, or what a killed one has left

A family is whole when COMPLETE is there; it is written last, after the folder has got its name.
"""

from __future__ import annotations

import ast
import fcntl
import hashlib
import json
import os
import shutil
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import fusionroute
import trainer
from trainer.lab_family.progress import WAITING, Progress, ProgressCallback
from trainer.lab_family.recipe import EXPERT_SLOTS, RECIPES, STAGES, Recipe
from trainer.lab_family.workers import Job, worker_pool

CACHE_VARIABLE = "FUSIONROUTE_CACHE_DIR"
COMPLETE_FILE = "COMPLETE"
FACTS_FILE = "facts.json"
LOCK_POLL_SECONDS = 0.2

# Sources whose change may change what is written; paths inside the two packages.
_SOURCES = {
    fusionroute: ("lab", "router_model.py", "vocabulary.py", "engine/model.py"),
    trainer: (".", "lab_family", "data"),
}
_SOURCES_WITHOUT_EFFECT = {
    *("build.py", "progress.py", "workers.py", "quality.py", "__init__.py", "__main__.py"),
    *("cli.py", "settings.py", "bootstrap.py", "servicer.py", "checkpoint_rpcs.py", "checkpoint_store.py"),
    *("extend.py", "extend_job.py", "pairs.py", "pair_journal.py", "verifiers.py", "promoter.py", "ownership.py"),
}

# CPU seconds per step at demo size: only their proportions count, for the share that `Progress` shows.
_SECONDS_PER_STEP = {"base": 0.045, "router": 0.024, "gates": 0.003, "preferences": 0.08}
_SECONDS_PER_EXPERT_STEP = 0.039


class FamilyIsBusy(TimeoutError):
    """Another process builds this family and did not end in time."""


@dataclass(frozen=True, slots=True)
class Family:
    """A complete family on disk.

    Attributes:
        folder: where everything lies.
        base: the common ancestor of all models, a causal LM folder.
        experts: causal LM folders by slot, in the order of the router's heads: math, strings, format.
        router_sft: the router checkpoint of phase I, which serves every combine rule.
        router: that of phase II, made from it.
        data: folder of what the routers have learnt from.
        facts: recipe, seed, versions, and losses and seconds by stage.
    """

    folder: Path
    base: Path
    experts: dict[str, Path]
    router_sft: Path
    router: Path
    data: Path
    facts: dict[str, Any]

    @classmethod
    def at(cls, folder: Path) -> Family:
        """The family in a folder that `is_complete`."""
        facts = json.loads((folder / FACTS_FILE).read_text(encoding="utf-8"))
        experts = {slot: folder / "experts" / slot for slot in EXPERT_SLOTS}
        return cls(
            folder=folder,
            base=folder / "base",
            experts=experts,
            router_sft=folder / "router_sft",
            router=folder / "router",
            data=folder / "data",
            facts=facts,
        )


def build(
    size: str = "demo",
    seed: int = 0,
    cache_dir: Path | str | None = None,
    processes: int = 2,
    progress: ProgressCallback | None = None,
    *,
    recipe: Recipe | None = None,
    wait_seconds: float = 3600.0,
) -> Family:
    """The family of this size and seed: from the cache, or trained now.

    On one machine the same arguments give the same weights, byte for byte. Demo size takes about two CPU
    minutes.

    Args:
        size: a key of `RECIPES`, ``demo`` or ``full``; just a name where `recipe` is given.
        seed: of initial weights and data.
        cache_dir: instead of ``$FUSIONROUTE_CACHE_DIR`` or ``~/.cache/fusionroute``.
        processes: worker processes; more than three are of no use.
        progress: called now and then; None for silence; `shown()` gives one with progress bars.
        recipe: instead of the one that `size` names.
        wait_seconds: how long to wait for another process that builds the same.

    Raises:
        ValueError: no recipe has this name, or `processes` is below one.
        FamilyIsBusy: another process builds the same and is not done after `wait_seconds`.
        WorkerFailed: training failed; nothing is left that looks complete.
    """
    if recipe is None and size not in RECIPES:
        raise ValueError(f"size = {size!r} is not allowed: {' or '.join(RECIPES)}")
    if processes < 1:
        raise ValueError(f"processes = {processes} is not allowed: at least 1")
    chosen = recipe or RECIPES[size]
    folder = family_folder(chosen, size, seed, cache_dir)
    if is_complete(folder):
        return Family.at(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _only_builder(folder, wait_seconds, progress):
        if not is_complete(folder):
            _remove_remains(folder)
            _build(folder, chosen, size, seed, min(processes, len(EXPERT_SLOTS)), progress)
    return Family.at(folder)


def family_folder(recipe: Recipe, size: str, seed: int, cache_dir: Path | str | None = None) -> Path:
    """Where the family of this recipe and seed lies, or will lie."""
    decisive = {
        "recipe": recipe.to_json(),
        "size": size,
        "seed": seed,
        "code": _source_digest(),
        "torch": metadata.version("torch"),
        "transformers": metadata.version("transformers"),
    }
    digest = hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()[:16]
    return _cache_root(cache_dir) / "lab" / f"{size}-{seed}-{digest}"


def is_complete(folder: Path) -> bool:
    """Whether a whole family lies there."""
    return (folder / COMPLETE_FILE).is_file()


def _cache_root(cache_dir: Path | str | None) -> Path:
    chosen = cache_dir or os.environ.get(CACHE_VARIABLE) or Path("~/.cache/fusionroute")
    return Path(chosen).expanduser().resolve()


_parsing = threading.Lock()
"""CPython 3.11 may fail to build a syntax tree while another thread builds one."""


def _source_digest() -> str:
    with _parsing:
        return _digest_of_sources()


def _digest_of_sources() -> str:
    hasher = hashlib.sha256()
    for package, names in _SOURCES.items():
        root = Path(package.__path__[0])
        paths = [root / name for name in names]
        files = sorted(file for path in paths for file in ([path] if path.is_file() else path.glob("*.py")))
        for file in files:
            if file.name not in _SOURCES_WITHOUT_EFFECT:
                hasher.update(f"{file.relative_to(root)}\n".encode())
                # the syntax tree: a comment or a line break should not cost a new build
                hasher.update(ast.dump(ast.parse(file.read_bytes())).encode())
    return hasher.hexdigest()


def _build(
    folder: Path, recipe: Recipe, size: str, seed: int, processes: int, progress: ProgressCallback | None
) -> None:
    """Train into a folder of another name, then give it its name, then declare it complete."""
    start = time.perf_counter()
    partial = folder.with_name(f"{folder.name}.partial-{uuid.uuid4().hex[:8]}")
    partial.mkdir()
    report = _Reporter(recipe, progress)
    try:
        stages: dict[str, Any] = {}
        with worker_pool(processes) as pool:
            for group in (("base",), ("format", "math", "strings"), ("router",), ("preferences",)):
                jobs = [Job(stage, recipe, seed, partial) for stage in group]
                stages |= pool.run(jobs, report)
        facts = {
            "size": size,
            "seed": seed,
            "recipe": recipe.to_json(),
            "code_version": fusionroute.__version__,
            "torch": metadata.version("torch"),
            "transformers": metadata.version("transformers"),
            "stages": stages,
            "wall_seconds": round(time.perf_counter() - start, 1),
        }
        (partial / FACTS_FILE).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
        _settle_tree(partial)
        partial.rename(folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    _sync(folder.parent)
    (folder / COMPLETE_FILE).touch()
    _sync(folder)


class _Reporter:
    """Turns steps of stages into `Progress`."""

    def __init__(self, recipe: Recipe, progress: ProgressCallback | None) -> None:
        self._progress = progress
        self._num_steps = {name: recipe.stage(name).num_steps for name in STAGES}
        self._seconds = {
            name: steps * _SECONDS_PER_STEP.get(name, _SECONDS_PER_EXPERT_STEP)
            for name, steps in self._num_steps.items()
        }
        self._shares = dict.fromkeys(STAGES, 0.0)

    def __call__(self, stage: str, step: int, loss: float) -> None:
        num_steps = self._num_steps[stage]
        self._shares[stage] = step / num_steps
        if self._progress is not None:
            done = sum(self._seconds[name] * share for name, share in self._shares.items())
            self._progress(Progress(stage, step, num_steps, loss, done / sum(self._seconds.values())))


@contextmanager
def _only_builder(folder: Path, wait_seconds: float, progress: ProgressCallback | None) -> Iterator[None]:
    """Hold the family's lock; the kernel frees it when its holder dies."""
    deadline = time.monotonic() + wait_seconds
    told = False
    with Path(f"{folder}.lock").open("a") as lock:
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    raise FamilyIsBusy(
                        f"another process builds {folder} and was not done after {wait_seconds:.0f} s"
                    ) from None
            if progress is not None and not told:
                progress(Progress(WAITING, 0, 1, 0.0, 0.0))
                told = True
            time.sleep(LOCK_POLL_SECONDS)
        yield


def _remove_remains(folder: Path) -> None:
    """Remove what killed builds have left: whoever holds the lock is the only builder."""
    for remains in (folder, *folder.parent.glob(f"{folder.name}.partial-*")):
        if remains.exists():
            shutil.rmtree(remains)


def _settle_tree(folder: Path) -> None:
    """Everything safe on disk, and weights, which come readable for us alone, as readable as other files."""
    ordinary_mode = (folder / FACTS_FILE).stat().st_mode
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            path.chmod(ordinary_mode)
        _sync(path)
    _sync(folder)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
