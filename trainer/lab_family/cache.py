"""Where families and variants lie, and how a folder of them comes to be: whole or not at all, by one builder at a time.

    <cache>/lab/<family>/           base/  experts/{math,strings,format}/  router_sft/  router/
                                    data/{router,prompts,pairs}.jsonl.gz  labels/  facts.json  COMPLETE
    <cache>/lab/<family>.variants/  see `variants`
    <cache>/lab/<family>.lock       held by whoever builds the family or its variants
    <folder>.partial-*              under way, or what a killed build has left

A folder is whole when COMPLETE is there; it is written last, after the folder has got its name.
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
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from typing import Any

import fusionroute
import trainer
from trainer.lab_family.recipe import Recipe

CACHE_VARIABLE = "FUSIONROUTE_CACHE_DIR"
COMPLETE_FILE = "COMPLETE"
FACTS_FILE = "facts.json"
LOCK_POLL_SECONDS = 0.2

# Sources whose change may change what is written; paths inside the two packages.
_SOURCES = {
    fusionroute: ("lab", "router_model.py", "router_heads.py", "vocabulary.py", "engine/model.py"),
    trainer: (".", "lab_family", "data"),
}
_SOURCES_WITHOUT_EFFECT = {
    *(
        "build.py",
        "cache.py",
        "graph.py",
        "progress.py",
        "workers.py",
        "quality.py",
        "__init__.py",
        "__main__.py",
    ),
    *("variants.py", "variant_stage.py", "reward.py"),
    *("cli.py", "settings.py", "bootstrap.py", "servicer.py", "checkpoint_rpcs.py", "checkpoint_store.py"),
    *(
        "extend.py",
        "extend_job.py",
        "pairs.py",
        "pair_journal.py",
        "verifiers.py",
        "promoter.py",
        "ownership.py",
    ),
}


class FamilyIsBusy(TimeoutError):
    """Another process builds this family and did not end in time."""


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
    files = []
    for package, names in _SOURCES.items():
        paths = [Path(package.__path__[0]) / name for name in names]
        found = sorted(file for path in paths for file in ([path] if path.is_file() else path.glob("*.py")))
        files += [file for file in found if file.name not in _SOURCES_WITHOUT_EFFECT]
    return digest_of_sources(tuple(files))


def digest_of_sources(files: Sequence[Path]) -> str:
    """Digest of the syntax trees of files of one or more packages: a comment or a line break costs no new build."""
    with _parsing:
        return _digest_of_trees(tuple(files))


@lru_cache
def _digest_of_trees(files: tuple[Path, ...]) -> str:
    """Read once: what runs is what was there when it was imported."""
    hasher = hashlib.sha256()
    for file in files:
        hasher.update(f"{file.parent.name}/{file.name}\n".encode())
        hasher.update(ast.dump(ast.parse(file.read_bytes())).encode())
    return hasher.hexdigest()


@contextmanager
def only_builder(folder: Path, wait_seconds: float, tell_waiting: Callable[[], None]) -> Iterator[None]:
    """Hold the family's lock; the kernel frees it when its holder dies.

    Args:
        tell_waiting: called once where another holds it.

    Raises:
        FamilyIsBusy: it was held for `wait_seconds`.
    """
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
            if not told:
                tell_waiting()
                told = True
            time.sleep(LOCK_POLL_SECONDS)
        yield


def begin(folder: Path) -> Path:
    """An empty folder to build in; what killed builds of `folder` have left is removed.

    Only whoever holds the lock may call it.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    for remains in (folder, *folder.parent.glob(f"{folder.name}.partial-*")):
        if remains.exists():
            shutil.rmtree(remains)
    partial = folder.with_name(f"{folder.name}.partial-{uuid.uuid4().hex[:8]}")
    partial.mkdir()
    return partial


def remove_partial(parent: Path) -> None:
    """What killed builds have left among variants, of whatever digest. Only whoever holds the lock may call it."""
    for remains in parent.glob("*.partial-*"):
        shutil.rmtree(remains)


def finish(partial: Path, folder: Path, facts: Mapping[str, Any]) -> None:
    """Write the facts, give a built folder its name, then declare it complete."""
    (partial / FACTS_FILE).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    _settle_tree(partial)
    partial.rename(folder)
    _sync(folder.parent)
    (folder / COMPLETE_FILE).touch()
    _sync(folder)


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
