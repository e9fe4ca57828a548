"""Caches of a model that is split over several processes: what process 0 does to its own, the others repeat.

Every process holds the keys and values of its own heads for all sessions. What a forward writes, it writes in each;
what the bookkeeping changes in between (room for a session, parts that sessions share, memory given back) is noted here
and sent along with the next forward.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from fusionroute.engine.kv_cache import KVCache, SessionCache
from fusionroute.engine.parallel_messages import CacheCall, Plain

MIRRORED = ("room", "free", "rename", "split", "build_upon", "copy", "free_part")
"""Methods of `KVCache` that change it; all take ids and numbers only."""


class NotedCache(KVCache):
    """The caches of process 0, which notes each change."""

    def __init__(self) -> None:
        super().__init__()
        self._calls: list[CacheCall] = []
        self._ids: dict[int, str] = {}

    def room(self, session_id: str, capacity_tokens: int, cached_length: int) -> SessionCache:
        """As `KVCache.room`."""
        before = self._sessions.get(session_id)
        is_as_before = (
            before is not None
            and id(before) in self._ids
            and before.capacity_tokens == capacity_tokens
            and before.num_shared <= cached_length
        )
        cache = super().room(session_id, capacity_tokens, cached_length)
        if not is_as_before:
            self._ids[id(cache)] = session_id
            self._note("room", session_id, capacity_tokens, cached_length)
        return cache

    def free(self, session_id: str) -> None:
        """As `KVCache.free`."""
        self._forget(session_id)
        super().free(session_id)
        self._note("free", session_id)

    def rename(self, session_id: str, new_id: str) -> None:
        """As `KVCache.rename`."""
        self._forget(session_id)
        super().rename(session_id, new_id)
        self._note("rename", session_id, new_id)

    def split(
        self, session_id: str, part_id: str, stop: int, cached_length: int, capacity_tokens: int
    ) -> None:
        """As `KVCache.split`."""
        super().split(session_id, part_id, stop, cached_length, capacity_tokens)
        self._note("split", session_id, part_id, stop, cached_length, capacity_tokens)

    def build_upon(self, session_id: str, capacity_tokens: int, parts: Sequence[tuple[str, int]]) -> None:
        """As `KVCache.build_upon`."""
        self._forget(session_id)
        super().build_upon(session_id, capacity_tokens, parts)
        self._note("build_upon", session_id, capacity_tokens, [list(part) for part in parts])

    def copy(self, session_id: str, from_id: str, num_tokens: int, capacity_tokens: int) -> None:
        """As `KVCache.copy`."""
        self._forget(session_id)
        super().copy(session_id, from_id, num_tokens, capacity_tokens)
        self._note("copy", session_id, from_id, num_tokens, capacity_tokens)

    def free_part(self, part_id: str) -> None:
        """As `KVCache.free_part`."""
        super().free_part(part_id)
        self._note("free_part", part_id)

    def session_of(self, cache: SessionCache) -> str:
        """Whose cache this is, which `room` has given out."""
        return self._ids[id(cache)]

    def take_calls(self) -> list[CacheCall]:
        """The changes since the last time."""
        calls, self._calls = self._calls, []
        return calls

    def _forget(self, session_id: str) -> None:
        """The session's present cache is about to go, or to be another's."""
        if (cache := self._sessions.get(session_id)) is not None:
            self._ids.pop(id(cache), None)

    def _note(self, method: str, *arguments: Plain) -> None:
        self._calls.append(CacheCall(method, arguments))


def repeat(calls: Iterable[CacheCall], caches: KVCache, known: dict[str, SessionCache]) -> None:
    """Does to `caches` what was done to those of process 0.

    Args:
        known: the cache that `room` has given to each session; kept up to date.
    """
    for call in calls:
        assert call.method in MIRRORED, call.method
        result = getattr(caches, call.method)(*call.arguments)
        if call.method == "room":
            known[str(call.arguments[0])] = result
        elif call.method in ("free", "rename"):
            known.pop(str(call.arguments[0]), None)
