"""A few threads that help with one computation at a time, cut into chunks that any of them may take.

    caller:  takes chunk 0, 2, 3, ...    }
    helper:       takes chunk 1, 4, ...  }  whoever is free takes the next; the caller waits for taken ones only

For kernels that run without Python's lock. A helper that does not get a processor costs nothing: the caller takes its
chunks. Any number of callers may run at the same time. OpenMP's pools, of which a process may have several, are not
involved.
"""

from __future__ import annotations

import itertools
import os
import threading
from collections.abc import Callable
from functools import cache
from queue import Empty, SimpleQueue

CHUNK_SECONDS = 600.0
"""No chunk takes so long; a helper that has not finished by then is lost."""


class Crew:
    """`num_threads` including the caller's."""

    def __init__(self, num_threads: int) -> None:
        self.num_threads = num_threads
        self._jobs: list[SimpleQueue[_Job]] = [SimpleQueue() for _ in range(num_threads - 1)]
        for number, jobs in enumerate(self._jobs):
            threading.Thread(target=_help, args=(jobs,), name=f"crew-{number}", daemon=True).start()

    def run(self, chunk: Callable[[int], None], num_chunks: int) -> None:
        """Calls `chunk` with each number below `num_chunks` once; returns when all have returned.

        Raises:
            TimeoutError: a helper has not finished its chunk in `CHUNK_SECONDS`.
        """
        job = _Job(chunk, num_chunks)
        for jobs in self._jobs[: num_chunks - 1]:
            jobs.put(job)
        num_others = num_chunks - job.work()
        for _ in range(num_others):
            try:
                error = job.ended.get(timeout=CHUNK_SECONDS)
            except Empty:
                raise TimeoutError(f"a chunk has not ended in {CHUNK_SECONDS:.0f} seconds") from None
            if error is not None:
                raise error


class _Job:
    def __init__(self, chunk: Callable[[int], None], num_chunks: int) -> None:
        self._chunk = chunk
        self._num_chunks = num_chunks
        self._next = itertools.count()  # one step of it is one operation under Python's lock
        self.ended: SimpleQueue[Exception | None] = SimpleQueue()

    def work(self) -> int:
        """Does what nobody else does; returns how many chunks that were."""
        for done in itertools.count():
            number = next(self._next)
            if number >= self._num_chunks:
                return done
            self._chunk(number)
        raise AssertionError("unreachable")

    def help(self) -> None:
        """The same, telling the caller of each chunk."""
        while (number := next(self._next)) < self._num_chunks:
            try:
                self._chunk(number)
            except Exception as error:
                self.ended.put(error)
            else:
                self.ended.put(None)


def _help(jobs: SimpleQueue[_Job]) -> None:
    while True:
        jobs.get().help()


def crew_of(num_threads: int) -> Crew:
    """The process's crew of this size, made when it is first asked for."""
    return _crew(num_threads, os.getpid())


@cache
def _crew(num_threads: int, process: int) -> Crew:
    return Crew(num_threads)
