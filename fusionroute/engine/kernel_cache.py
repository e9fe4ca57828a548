"""Where compiled kernels are kept between starts: a folder of the user's own, or nowhere."""

from __future__ import annotations

import fcntl
import hashlib
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_SOURCES = ("row_intrinsics.py", "row_kernels.py", "row_step_kernels.py", "row_tiles.py")


@contextmanager
def kernels_kept() -> Iterator[None]:
    """What is decorated within keeps its compiled code: under NUMBA_CACHE_DIR if set, else under
    ``$FUSIONROUTE_CACHE_DIR/kernels`` (default ``~/.cache/fusionroute``); nowhere if that is not ours alone to write.
    """
    from numba import config

    before = config.CACHE_DIR
    if not before and (folder := _own_folder()) is not None:
        config.CACHE_DIR = str(folder)
    try:
        yield
    finally:
        config.CACHE_DIR = before


@contextmanager
def one_compiler() -> Iterator[None]:
    """Processes that start together compile one after the other, so that all but the first find its code.

    Without a folder of our own nothing is kept, and nobody waits; nor where its file system knows no locks. Whoever
    dies lets the next one in.
    """
    folder = _own_folder()
    if folder is None:
        yield
        return
    with (folder / "compiling.lock").open("w") as lock:
        with suppress(OSError):
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def is_cached() -> bool:
    """Whether there is a place for compiled code just now."""
    from numba import config

    return bool(config.CACHE_DIR)


def _own_folder() -> Path | None:
    return kernel_folder(Path(os.environ.get("FUSIONROUTE_CACHE_DIR") or "~/.cache/fusionroute"))


def kernel_folder(root: Path) -> Path | None:
    """A folder under `root` for this version of the sources; None if there can be none that only we may write.

    Compiled code is run: whoever may write here is as powerful as who may write the package.
    """
    digest = hashlib.sha256()
    for name in _SOURCES:
        digest.update((Path(__file__).parent / name).read_bytes())
    try:
        folder = root.expanduser() / "kernels" / digest.hexdigest()[:16]
        folder.parent.parent.mkdir(parents=True, exist_ok=True)
        for each in (folder.parent, folder):
            each.mkdir(mode=0o700, exist_ok=True)
            found = each.lstat()
            is_writable_by_others = bool(found.st_mode & (stat.S_IWGRP | stat.S_IWOTH))
            if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or is_writable_by_others:
                return None
    except (OSError, RuntimeError):  # RuntimeError: of a user without a home
        return None
    return folder if os.access(folder, os.W_OK) else None
