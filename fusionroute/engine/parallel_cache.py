"""Caches of a model that is split over several processes: what process 0 does to its own, the others repeat.

Every process holds the keys and values of its own heads for all sessions. What a forward writes, it writes in each;
what the bookkeeping changes in between (room for a session, memory given back) is noted here and sent along with
the next forward.
"""

from __future__ import annotations

from collections.abc import Iterable

from fusionroute.engine.kv_cache import KVCache, SessionCache
from fusionroute.engine.parallel_messages import CacheCall, Plain

MIRRORED = ("room", "free")
"""Methods of `KVCache` that change it."""


class NotedCache(KVCache):
    """The caches of process 0, which notes each change."""

    def __init__(self) -> None:
        super().__init__()
        self._calls: list[CacheCall] = []
        self._ids: dict[int, str] = {}

    def room(self, session_id: str, capacity_tokens: int, cached_length: int) -> SessionCache:
        """As `KVCache.room`."""
        cache = super().room(session_id, capacity_tokens, cached_length)
        self._ids[id(cache)] = session_id
        self._note("room", session_id, capacity_tokens, cached_length)
        return cache

    def free(self, session_id: str) -> None:
        """As `KVCache.free`."""
        super().free(session_id)
        self._ids = {key: other for key, other in self._ids.items() if other != session_id}
        self._note("free", session_id)

    def session_of(self, cache: SessionCache) -> str:
        """Whose cache this is."""
        return self._ids[id(cache)]

    def take_calls(self) -> list[CacheCall]:
        """The changes since the last time."""
        calls, self._calls = self._calls, []
        return calls

    def _note(self, method: str, *arguments: Plain) -> None:
        self._calls.append(CacheCall(method, arguments))


def repeat(calls: Iterable[CacheCall], caches: KVCache, known: dict[str, SessionCache]) -> None:
    """Does to `caches` what was done to those of process 0.

    Args:
        known: the cache of each session, kept up to date.
    """
    for call in calls:
        assert call.method in MIRRORED, call.method
        result = getattr(caches, call.method)(*call.arguments)
        session_id = str(call.arguments[0])
        if call.method == "free":
            known.pop(session_id, None)
        elif isinstance(result, SessionCache):
            known[session_id] = result
