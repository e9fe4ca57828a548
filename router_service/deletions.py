"""Which expert has not heard yet of which deleted session: one that was away, and one that did not answer."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field

REMEMBERED_SECONDS = 600.0
MOST_REMEMBERED = 10_000
CLOCKS_DIFFER_SECONDS = 60.0
"""At most, between hosts."""


@dataclass(slots=True)
class Deletions:
    """Sessions deleted lately, and who is to be told.

    Whoever comes, or comes back, is told of all that were deleted since its model was loaded. Older deletions are
    forgotten; the experts evict such sessions in time.
    """

    _deleted: OrderedDict[str, float] = field(default_factory=OrderedDict)
    _untold: dict[str, dict[str, None]] = field(default_factory=dict)

    def add(self, session_id: str, now: float) -> None:
        """Remembers a deletion. `now`: seconds since 1970."""
        self._deleted.pop(session_id, None)
        self._deleted[session_id] = now
        for sessions in self._untold.values():
            sessions[session_id] = None
        self._forget_old(now)

    def told(self, name: str, session_id: str) -> None:
        """An expert has heard of a deletion."""
        self._untold.get(name, {}).pop(session_id, None)

    def untold(self, loaded: Mapping[str, float], now: float) -> dict[str, list[str]]:
        """What each expert that is there now has not heard of.

        Args:
            loaded: when they loaded their models, seconds since 1970, by name.
            now: likewise.
        """
        self._forget_old(now)
        for gone in self._untold.keys() - loaded.keys():
            del self._untold[gone]
        for name in loaded.keys() - self._untold.keys():
            since = loaded[name] - CLOCKS_DIFFER_SECONDS
            self._untold[name] = dict.fromkeys(each for each, at in self._deleted.items() if at >= since)
        return {name: list(sessions) for name, sessions in self._untold.items() if sessions}

    def _forget_old(self, now: float) -> None:
        while self._deleted:
            oldest, deleted_at = next(iter(self._deleted.items()))
            if len(self._deleted) <= MOST_REMEMBERED and deleted_at >= now - REMEMBERED_SECONDS:
                return
            del self._deleted[oldest]
            for sessions in self._untold.values():
                sessions.pop(oldest, None)
