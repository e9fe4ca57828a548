"""The heap of an engine that has nothing to do: what forwards and closed sessions have left goes back to the system.

The C library keeps what is freed, in pieces between what lives on: a session that begins with a long prompt would take
a fifth to a third more than its keys and values, and closed ones would give nothing back. Milliseconds, in which other
threads wait for memory; so only after a moment of quiet, and not after every few tokens.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache

QUIET_SECONDS = 0.25
LEAST_TOKENS = 256


class IdleHeap:
    """When to trim the heap, for one engine."""

    def __init__(self) -> None:
        self._num_tokens = 0
        self._num_sessions = 0
        self._trim = heap_trimmer()

    def computed(self, num_tokens: int) -> None:
        """Forwards of so many tokens have run."""
        self._num_tokens += num_tokens

    def wait_seconds(self, num_sessions: int) -> float | None:
        """How long to wait for work before trimming; None where there is nothing to gain.

        Args:
            num_sessions: that there are now.
        """
        has_gaps = self._num_tokens >= LEAST_TOKENS or num_sessions < self._num_sessions
        return QUIET_SECONDS if has_gaps and self._trim is not None else None

    def trim(self, num_sessions: int) -> None:
        """Gives free memory back; blocks for milliseconds, without holding the interpreter."""
        if self._trim is not None:
            self._trim(0)
        self._num_tokens, self._num_sessions = 0, num_sessions


@cache
def heap_trimmer() -> Callable[[int], int] | None:
    """glibc's malloc_trim; other C libraries have none, and None is returned."""
    try:
        trim = ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError, TypeError):  # TypeError: Windows has no CDLL(None)
        return None
    trim.argtypes, trim.restype = [ctypes.c_size_t], ctypes.c_int
    found: Callable[[int], int] = trim
    return found
