"""Rows that cross between two processes of one host without crossing a socket.

    caller                                              service
    create: nameless file in memory, locked; name it
    name, size, proof  ------- first message -------->  open: owner, size and proof are right? then it is mapped
    remove the name    <------ accepted or not -------
    place for each step's rows  --------------------->  writes them there
    reads them there   <------ the step has ended ----
    a place is given again when nobody refers to its rows any more

The name lives for one round trip. Whoever is killed within it leaves a file behind that nobody holds a lock on; the
next one to create a memory removes such files.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import re
import secrets
import stat
import weakref
from bisect import insort
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

FOLDER = Path("/dev/shm")  # noqa: S108 - this is the one where files are memory
PREFIX = "fusionroute-rows-"
PROOF_BYTES = 32
MOST_BYTES = 2**31
_ALIGNMENT_BYTES = 64
_NAME = re.compile(re.escape(PREFIX) + r"[0-9a-f]{32}")


class MemoryRefused(Exception):
    """A memory cannot be made or cannot be shared; the message says why. Rows go into messages then."""


class RowMemory:
    """The caller's side: makes a memory and says where in it which rows belong.

    Attributes:
        name: of the file, without a folder.
        num_bytes: its size.
        proof: what stands in its first bytes.
    """

    def __init__(self, num_bytes: int, folder: Path = FOLDER) -> None:
        """Takes a memory of at least so many bytes, a millisecond for each MiB. Raises MemoryRefused."""
        self.name = PREFIX + secrets.token_hex(16)
        self.num_bytes = _ALIGNMENT_BYTES + _aligned(num_bytes)
        self.proof = secrets.token_bytes(PROOF_BYTES)
        self._path = folder / self.name
        self._descriptor: int | None
        self._descriptor, self._map = _new_map(folder, self.num_bytes, self.proof)
        self._free = [(_ALIGNMENT_BYTES, self.num_bytes - _ALIGNMENT_BYTES)]
        self._returned: deque[tuple[int, int]] = deque()  # by whoever drops the last reference, in any thread
        self._watched: dict[int, weakref.ref[object]] = {}

    def publish(self) -> None:
        """Gives it its name, under which the service finds it. Raises MemoryRefused."""
        assert self._descriptor is not None
        try:
            with _opened(Path("/proc/self/fd"), os.O_RDONLY) as descriptors:
                os.link(str(self._descriptor), self._path, src_dir_fd=descriptors, follow_symlinks=True)
        except OSError as error:
            self.unlink()
            raise MemoryRefused(f"no file {self._path} can be made: {error.strerror}") from None

    def unlink(self) -> None:
        """Nobody can find it any more; who has it keeps it."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None
            with suppress(OSError):
                self._path.unlink()

    def place(self, num_bytes: int) -> Place | None:
        """Room for rows, None where there is none now."""
        while self._returned:
            self._take_back(self._returned.popleft())
        wanted = _aligned(num_bytes)
        for index, (offset, size) in enumerate(self._free):
            if size >= wanted:
                if size == wanted:
                    del self._free[index]
                else:
                    self._free[index] = (offset + wanted, size - wanted)
                return Place(self._map, offset, wanted, self._returned, self._watched)
        return None

    def _take_back(self, place: tuple[int, int]) -> None:
        """Joins a place with the free ones beside it."""
        insort(self._free, place)
        joined: list[tuple[int, int]] = []
        for offset, size in self._free:
            if joined and sum(joined[-1]) == offset:
                joined[-1] = (joined[-1][0], joined[-1][1] + size)
            else:
                joined.append((offset, size))
        self._free = joined


class Place:
    """Where one step's rows belong.

    Attributes:
        offset: in the memory, in bytes.
        num_bytes: its size.
    """

    __slots__ = ("_map", "_returned", "_watched", "num_bytes", "offset")

    def __init__(
        self,
        memory: mmap.mmap,
        offset: int,
        num_bytes: int,
        returned: deque[tuple[int, int]],
        watched: dict[int, weakref.ref[object]],
    ) -> None:
        self.offset, self.num_bytes = offset, num_bytes
        self._map = memory
        self._returned = returned
        self._watched = watched

    def floats(self, count: int) -> NDArray[np.float32]:
        """What stands there [count], read-only; the place is given again once no array refers to it. At most once."""
        assert count * 4 <= self.num_bytes
        # Arrays made from this one refer to the ctypes object, which, unlike a map, can be watched.
        data = (ctypes.c_char * (count * 4)).from_buffer(self._map, self.offset)
        returned, place = self._returned, (self.offset, self.num_bytes)
        watched, offset = self._watched, self.offset

        def unreferenced(_: object) -> None:
            watched.pop(offset, None)
            returned.append(place)

        watched[offset] = weakref.ref(data, unreferenced)
        floats: NDArray[np.float32] = np.frombuffer(memoryview(data), dtype=np.float32)
        floats.flags.writeable = False
        return floats

    def give_back(self) -> None:
        """Nobody has read it and the service has done with it."""
        self._returned.append((self.offset, self.num_bytes))


def open_memory(name: str, num_bytes: int, proof: bytes, folder: Path = FOLDER) -> mmap.mmap:
    """The service's side: maps what a caller offers.

    Raises:
        MemoryRefused: it is not on this host, not ours, or not what it is said to be.
    """
    if _NAME.fullmatch(name) is None or not _ALIGNMENT_BYTES < num_bytes <= MOST_BYTES:
        raise MemoryRefused("this is no name, or no size, of a memory")
    if len(proof) != PROOF_BYTES:
        raise MemoryRefused(f"the proof has {len(proof)} bytes, not {PROOF_BYTES}")
    try:
        with _opened(folder / name, os.O_RDWR) as descriptor:
            found = os.fstat(descriptor)
            if not stat.S_ISREG(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o077:
                raise MemoryRefused("the file is not ours alone")
            if found.st_size != num_bytes:
                raise MemoryRefused(f"the file has {found.st_size} bytes, not {num_bytes}")
            if not secrets.compare_digest(os.pread(descriptor, PROOF_BYTES, 0), proof):
                raise MemoryRefused("the proof does not stand in the file")
            return mmap.mmap(descriptor, num_bytes)
    except OSError as error:
        raise MemoryRefused(f"the file cannot be opened: {error.strerror}") from None


def remove_abandoned(folder: Path = FOLDER) -> int:
    """Removes the files of callers that were killed before they could; returns how many."""
    num_removed = 0
    with suppress(OSError):
        for path in list(folder.glob(PREFIX + "*")):
            with suppress(OSError), _opened(path, os.O_RDONLY) as descriptor:
                if os.fstat(descriptor).st_uid != os.geteuid():
                    continue
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink()
                num_removed += 1
    return num_removed


def _new_map(folder: Path, num_bytes: int, proof: bytes) -> tuple[int, mmap.mmap]:
    """A file with its size, its lock and its proof, but without a name; its descriptor and the map of it."""
    try:
        descriptor = os.open(folder, os.O_RDWR | os.O_TMPFILE | os.O_CLOEXEC, 0o600)
    except (OSError, AttributeError) as error:  # another system has no O_TMPFILE
        raise MemoryRefused(f"no memory to share rows in: {error}") from None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        # Memory that is missing must be missed now: a write to it later would be a bus error.
        os.posix_fallocate(descriptor, 0, num_bytes)
        os.pwrite(descriptor, proof, 0)
        return descriptor, mmap.mmap(descriptor, num_bytes)  # has its own descriptor, which keeps the lock
    except OSError as error:
        os.close(descriptor)
        full = error.errno in (errno.ENOSPC, errno.ENOMEM, errno.EDQUOT)
        why = f"{folder} has no {num_bytes} bytes left" if full else str(error.strerror)
        raise MemoryRefused(f"no memory to share rows in: {why}") from None


@contextmanager
def _opened(path: Path, flags: int) -> Iterator[int]:
    descriptor = os.open(path, flags | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _aligned(num_bytes: int) -> int:
    return max(1, -(-num_bytes // _ALIGNMENT_BYTES)) * _ALIGNMENT_BYTES
