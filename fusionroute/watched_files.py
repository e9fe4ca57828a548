"""Files that may be replaced while a process runs: read again when they have changed, never taken half-written."""

from __future__ import annotations

import os
import stat
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Generic, TypeAlias, TypeVar

import structlog

from fusionroute.errors import FusionRouteError

CHECK_SECONDS = 1.0
MAX_FILE_BYTES = 256 * 1024

T = TypeVar("T")
Stamp: TypeAlias = tuple[tuple[int, int, int, int], ...]

log = structlog.get_logger(__name__)


class WatchedFiles(Generic[T]):
    """What one or several files say together; `current` looks at most once a second whether they have changed.

    A change counts once it has stood still from one look to the next and can be read as a whole. Until then, and
    when it never can, what was read before stays, and the log says so.

    Args:
        paths: the files.
        read: reads them; raises OSError, or FusionRouteError naming field and file but never what is in it.
        clock: monotonic, seconds.

    Raises:
        OSError, FusionRouteError: as `read` does; only when constructed.
    """

    def __init__(
        self, paths: Sequence[Path], read: Callable[[], T], *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._paths = tuple(paths)
        self._read = read
        self._clock = clock
        self._stamp: Stamp | None = None
        with suppress(OSError):  # `read` says it better
            self._stamp = _stamp_of(self._paths)
        self._value = read()
        self._seen: Stamp | None = self._stamp
        self._looked_at = clock()
        self.generation = 0

    def current(self) -> T:
        """What the files said when they could last be read; `generation` has grown if that is new."""
        now = self._clock()
        if now - self._looked_at >= CHECK_SECONDS:
            self._looked_at = now
            self._look()
        return self._value

    def _look(self) -> None:
        try:
            stamp = _stamp_of(self._paths)
        except OSError as error:
            if self._seen is not None:
                self._complain(error)
            self._seen = None
            return
        is_still, self._seen = stamp == self._seen, stamp
        if stamp == self._stamp or not is_still:
            return
        self._stamp = stamp
        try:
            value = self._read()
            if _stamp_of(self._paths) != stamp:
                self._stamp = None
                return
        except (OSError, FusionRouteError) as error:
            self._complain(error)
            return
        self._value = value
        self.generation += 1
        log.info("files_read_again", files=[str(path) for path in self._paths])

    def _complain(self, error: OSError | FusionRouteError) -> None:
        why = error.message if isinstance(error, FusionRouteError) else error.strerror
        names = [str(path) for path in self._paths]
        log.error("files_not_taken", files=names, message=why, note="what was read before stays in force")


def read_small(path: Path) -> str:
    """The text of a regular file of at most 256 KiB. Raises OSError; bytes that are no UTF-8 are replaced."""
    with open(path, "rb", opener=_open_at_once) as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise OSError(0, "not a regular file")
        content = file.read(MAX_FILE_BYTES + 1)
    if len(content) > MAX_FILE_BYTES:
        raise OSError(0, f"larger than {MAX_FILE_BYTES} bytes")
    return content.decode("utf-8", errors="replace")


def _open_at_once(path: str, flags: int) -> int:
    # A named pipe in the place of the file must not stop the event loop.
    return os.open(path, flags | os.O_NONBLOCK)


def _stamp_of(paths: Sequence[Path]) -> Stamp:
    found = [path.stat() for path in paths]
    return tuple((each.st_mtime_ns, each.st_ino, each.st_dev, each.st_size) for each in found)
