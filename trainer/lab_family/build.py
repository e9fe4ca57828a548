"""Building families and their variants once and finding them again, several of them on one pool of workers."""

from __future__ import annotations

import dataclasses
import json
import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import fusionroute
from trainer.lab_family import cache, variants
from trainer.lab_family.cache import FACTS_FILE, family_folder, is_complete
from trainer.lab_family.graph import Task, TaskGraph
from trainer.lab_family.progress import WAITING, Progress, ProgressCallback
from trainer.lab_family.recipe import EXPERT_SLOTS, RECIPES, Recipe
from trainer.lab_family.workers import Job, worker_pool

# CPU seconds per step at full size: only their proportions count, for order and the share that `Progress` shows.
_SECONDS_PER_STEP = {"base": 0.06, "router": 0.075, "gates": 0.003, "preferences": 0.3}
_SECONDS_PER_EXPERT_STEP = 0.065
_AFTER = {
    "base": (),
    **dict.fromkeys(EXPERT_SLOTS, ("base",)),
    "router": EXPERT_SLOTS,
    "preferences": ("router",),
}
"""The stages that are jobs of their own, and what each waits for; `gates` are trained by `router`."""


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
        variants: model folders by name, of those that were asked for.
    """

    folder: Path
    base: Path
    experts: dict[str, Path]
    router_sft: Path
    router: Path
    data: Path
    facts: dict[str, Any]
    variants: dict[str, Path] = field(default_factory=dict)

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
    """The family of this size and seed: from the cache, or trained now. Arguments and errors as of `build_all`.

    Demo size takes about two CPU minutes.
    """
    return build_all(
        size, (seed,), (), cache_dir, processes, progress, recipe=recipe, wait_seconds=wait_seconds
    )[0]


def build_all(
    size: str = "demo",
    seeds: Sequence[int] = (0,),
    names: Sequence[str] = (),
    cache_dir: Path | str | None = None,
    processes: int = 2,
    progress: ProgressCallback | None = None,
    *,
    recipe: Recipe | None = None,
    wait_seconds: float = 3600.0,
) -> list[Family]:
    """Families of one size, each with the same variants: from the cache, or trained now.

    The stages of all of them share one pool of workers. On one machine the same arguments give the same weights, byte
    for byte, whatever else is built beside.

    Args:
        size: a key of `RECIPES`, ``demo`` or ``full``; just a name where `recipe` is given.
        seeds: of initial weights and data, one for each family.
        names: keys of `VARIANTS`.
        cache_dir: instead of ``$FUSIONROUTE_CACHE_DIR`` or ``~/.cache/fusionroute``.
        processes: worker processes.
        progress: called now and then; None for silence; `shown()` gives one with progress bars.
        recipe: instead of the one that `size` names.
        wait_seconds: how long to wait for another process that builds one of them.

    Raises:
        ValueError: no recipe has this name, or `processes` is below one, or a seed is there twice.
        InvalidRequest: INVALID_FIELD, a variant's name is unknown.
        FamilyIsBusy: another process builds one of them and is not done after `wait_seconds`.
        WorkerFailed: training failed; nothing is left that looks complete and is not.
    """
    if recipe is None and size not in RECIPES:
        raise ValueError(f"size = {size!r} is not allowed: {' or '.join(RECIPES)}")
    if len(set(seeds)) != len(seeds):
        raise ValueError(f"seeds = {list(seeds)} is not allowed: each once")
    chosen = recipe or RECIPES[size]
    wanted = [_Wanted(family_folder(chosen, size, seed, cache_dir), chosen, size, seed) for seed in seeds]
    return _build_wanted(wanted, names, processes, progress, wait_seconds)


def build_variants(
    family: Family,
    names: Sequence[str],
    processes: int = 2,
    progress: ProgressCallback | None = None,
    *,
    wait_seconds: float = 3600.0,
) -> Family:
    """The same family with these variants: from the cache, or trained now, beside the family's folder.

    Arguments and errors as of `build_all`.
    """
    facts = family.facts
    wanted = _Wanted(family.folder, Recipe.from_json(facts["recipe"]), facts["size"], facts["seed"])
    return _build_wanted([wanted], names, processes, progress, wait_seconds)[0]


@dataclass(frozen=True, slots=True)
class _Wanted:
    """A family that is to be there in the end."""

    folder: Path
    recipe: Recipe
    size: str
    seed: int


def _build_wanted(
    wanted: Sequence[_Wanted],
    names: Sequence[str],
    processes: int,
    progress: ProgressCallback | None,
    wait_seconds: float,
) -> list[Family]:
    if processes < 1:
        raise ValueError(f"processes = {processes} is not allowed: at least 1")
    needed = variants.with_needed(names)
    missing = [each for each in wanted if not _is_there(each, needed)]
    with ExitStack() as locks:
        for each in sorted(missing, key=lambda each: each.folder):
            each.folder.parent.mkdir(parents=True, exist_ok=True)
            locks.enter_context(
                cache.only_builder(each.folder, wait_seconds, lambda: _tell_waiting(progress))
            )
        missing = [each for each in missing if not _is_there(each, needed)]
        for each in missing:
            cache.remove_partial(variants.variants_folder(each.folder))
        if missing:
            _Build(missing, needed, progress, prefixed=len(wanted) > 1).run(processes)
    return [_found(each, names) for each in wanted]


def _is_there(wanted: _Wanted, needed: Sequence[str]) -> bool:
    folders = (variants.variant_folder(wanted.folder, name) for name in needed)
    return is_complete(wanted.folder) and all(is_complete(folder) for folder in folders)


def _found(wanted: _Wanted, names: Sequence[str]) -> Family:
    made = {name: variants.variant_folder(wanted.folder, name) / name for name in names}
    return dataclasses.replace(Family.at(wanted.folder), variants=made)


def _tell_waiting(progress: ProgressCallback | None) -> None:
    if progress is not None:
        progress(Progress(WAITING, 0, 1, 0.0, 0.0))


class _Build:
    """One run of a pool over everything that is missing."""

    def __init__(
        self,
        missing: Sequence[_Wanted],
        needed: Sequence[str],
        progress: ProgressCallback | None,
        *,
        prefixed: bool,
    ) -> None:
        self._start = time.perf_counter()
        self._tasks: list[Task] = []
        self._jobs: dict[str, Job] = {}
        self._done: dict[str, Callable[[dict[str, Any]], None]] = {}
        self._partial: list[Path] = []
        self._report = _Reporter(progress)
        for each in missing:
            prefix = f"seed {each.seed}: " if prefixed else ""
            if not is_complete(each.folder):
                self._add_family(each, prefix)
            for name in needed:
                if not is_complete(variants.variant_folder(each.folder, name)):
                    self._add_variant(each, name, prefix)

    def run(self, processes: int) -> None:
        """Build it all, each folder complete as soon as it is."""
        try:
            graph = TaskGraph(self._tasks)
            with worker_pool(min(processes, len(self._tasks))) as pool:
                pool.run(graph, self._jobs, self._report, lambda key, facts: self._done[key](facts))
        finally:
            for partial in self._partial:
                shutil.rmtree(partial, ignore_errors=True)

    def _add_family(self, wanted: _Wanted, prefix: str) -> None:
        partial = self._begin(wanted.folder)
        stages: dict[str, Any] = {}

        def done(stage: str, facts: dict[str, Any]) -> None:
            stages[stage] = facts
            if len(stages) == len(_AFTER):
                cache.finish(partial, wanted.folder, self._family_facts(wanted, stages))

        for stage, after in _AFTER.items():
            counted = (stage, "gates") if stage == "router" else (stage,)
            seconds = 0.0
            for name in counted:
                steps = wanted.recipe.stage(name).num_steps
                cost = steps * _SECONDS_PER_STEP.get(name, _SECONDS_PER_EXPERT_STEP)
                self._report.expect(prefix, name, steps, cost)
                seconds += cost
            key = f"{prefix}{stage}"
            self._tasks.append(Task(key, seconds, frozenset(f"{prefix}{name}" for name in after)))
            self._jobs[key] = Job(stage, wanted.recipe, wanted.seed, partial)
            self._done[key] = lambda facts, stage=stage: done(stage, facts)  # type: ignore[misc]

    def _add_variant(self, wanted: _Wanted, name: str, prefix: str) -> None:
        folder = variants.variant_folder(wanted.folder, name)
        partial = self._begin(folder)
        key, cost = f"{prefix}{name}", variants.seconds(name, wanted.recipe)
        known = {task.key for task in self._tasks}
        needed = variants.needs(name)
        made_from = None if needed is None else variants.variant_folder(wanted.folder, needed)
        waits_for = {f"{prefix}preferences", f"{prefix}{needed}"}
        self._report.expect(prefix, name, variants.num_steps(name, wanted.recipe), cost)
        self._tasks.append(Task(key, cost, frozenset(waits_for & known)))
        self._jobs[key] = Job(name, wanted.recipe, wanted.seed, wanted.folder, partial, made_from)
        self._done[key] = lambda facts: cache.finish(
            partial, folder, {"name": name, "seed": wanted.seed, **facts}
        )

    def _begin(self, folder: Path) -> Path:
        partial = cache.begin(folder)
        self._partial.append(partial)
        return partial

    def _family_facts(self, wanted: _Wanted, stages: dict[str, Any]) -> dict[str, Any]:
        return {
            "size": wanted.size,
            "seed": wanted.seed,
            "recipe": wanted.recipe.to_json(),
            "code_version": fusionroute.__version__,
            "torch": metadata.version("torch"),
            "transformers": metadata.version("transformers"),
            "stages": stages,
            "wall_seconds": round(time.perf_counter() - self._start, 1),
        }


class _Reporter:
    """Turns steps of jobs into `Progress`."""

    def __init__(self, progress: ProgressCallback | None) -> None:
        self._progress = progress
        self._num_steps: dict[str, int] = {}
        self._seconds: dict[str, float] = {}
        self._shares: dict[str, float] = {}
        self._prefixes: dict[str, str] = {}

    def expect(self, prefix: str, name: str, num_steps: int, seconds: float) -> None:
        """A stage or variant that will be reported."""
        key = f"{prefix}{name}"
        self._prefixes[key] = prefix
        self._num_steps[key], self._seconds[key], self._shares[key] = num_steps, seconds, 0.0

    def __call__(self, job: str, name: str, step: int, loss: float) -> None:
        key = f"{self._prefixes[job]}{name}"
        num_steps = self._num_steps[key]
        self._shares[key] = step / num_steps
        if self._progress is not None:
            done = sum(self._seconds[name] * share for name, share in self._shares.items())
            self._progress(Progress(key, step, num_steps, loss, done / sum(self._seconds.values())))
