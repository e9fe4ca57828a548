"""What the last step of a session gave, for a caller that may want to see more of it: no forward is needed again."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, replace

from fusionroute.engine.session import Draft, Session, StepCall
from fusionroute.engine.steps import StepOutcome

MOST_KEPT_BYTES = 256 << 20
"""Above it the oldest are forgotten; their steps are computed again when they are asked for."""


@dataclass(frozen=True, slots=True)
class _Kept:
    from_position: int
    token_ids: tuple[int, ...]
    wanted: tuple[int, ...]
    draft: Draft | None
    digest: int
    outcome: StepOutcome

    @property
    def num_bytes(self) -> int:
        return self.outcome.rows.nbytes


class KeptOutcomes:
    """Outcomes of sessions' last steps, by session; only of steps that asked for it."""

    def __init__(self, most_bytes: int = MOST_KEPT_BYTES) -> None:
        self._most_bytes = most_bytes
        self._num_bytes = 0
        self._by_session: OrderedDict[str, _Kept] = OrderedDict()

    def keep(self, call: StepCall, session: Session, outcome: StepOutcome) -> None:
        """Remembers what a step gave."""
        self.forget(call.session_id)
        kept = _Kept(
            call.from_position,
            tuple(call.token_ids),
            tuple(call.wanted),
            call.draft,
            session.digests[-1],
            outcome,
        )
        self._by_session[call.session_id] = kept
        self._num_bytes += kept.num_bytes
        while self._num_bytes > self._most_bytes:
            self._num_bytes -= self._by_session.popitem(last=False)[1].num_bytes

    def again(self, call: StepCall, session: Session | None) -> StepOutcome | None:
        """What the same step has given, if the session still ends where it did.

        Nothing is computed for it: the outcome says so.
        """
        kept = self._by_session.get(call.session_id)
        if kept is None or session is None or session.exact != call.exact:
            return None
        is_same = (
            kept.from_position == call.from_position
            and kept.draft == call.draft
            and kept.digest == session.digests[-1]
            and _equal(kept.token_ids, call.token_ids)
            and _equal(kept.wanted, call.wanted)
        )
        if not is_same or session.cached_length != kept.outcome.position:
            return None
        return replace(
            kept.outcome, num_computed_tokens=0, queue_seconds=0.0, forward_seconds=0.0, num_forwards=0
        )

    def forget(self, session_id: str) -> None:
        """The session goes on, or is gone."""
        if self._by_session and (kept := self._by_session.pop(session_id, None)) is not None:
            self._num_bytes -= kept.num_bytes


def _equal(mine: tuple[int, ...], theirs: Sequence[int]) -> bool:
    return len(mine) == len(theirs) and mine == tuple(theirs)
