"""Putting a finished checkpoint where routers look for them: once, whole, and never over another."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from pathlib import Path


def publish(artifact: Path, target: Path) -> None:
    """Moves the folder `artifact` to `target`; where that is there already, it was done before and all is well.

    Between file systems a copy beside the target takes its place at once, so that a reader never sees a part.

    Raises:
        OSError: among them ENOSPC; nothing is published then, and `artifact` is as it was.
    """
    if target.exists():
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        _rename(artifact, target)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        _copy(artifact, target)


def _copy(artifact: Path, target: Path) -> None:
    staged = target.with_name(f".{target.name}.staged")
    shutil.rmtree(staged, ignore_errors=True)
    try:
        shutil.copytree(artifact, staged)
        for path in staged.rglob("*"):
            if path.is_file():
                _sync(path)
        _rename(staged, target)
    finally:
        shutil.rmtree(staged, ignore_errors=True)
    shutil.rmtree(artifact, ignore_errors=True)


def _rename(source: Path, target: Path) -> None:
    try:
        source.rename(target)
    except OSError as error:
        # A folder that is not empty is never replaced: somebody else has published it this moment.
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
    _sync(target.parent)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    with contextlib.ExitStack() as stack:
        stack.callback(os.close, descriptor)
        os.fsync(descriptor)
