"""A session's tokens as its writer sees them, and what it remembers of the models that have cached them."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Self

from fusionroute.engine import StepCall, digest
from fusionroute.engine.digest import EMPTY
from router_service.records import Records, TokenSource, to_token_records


@dataclass(slots=True)
class Text:
    """A session's tokens and how far each model has cached them.

    Attributes:
        session_id: under which the models cache it.
        fence: the writer's fencing token.
        tokens: all tokens, prompts included.
        num_replays: times that a model had lost the session and was sent all of it again.
        num_retries: times that a model had to be asked again for any other reason.
    """

    session_id: str
    fence: int
    tokens: list[int]
    num_replays: int = 0
    num_retries: int = 0
    _digests: array[int] = field(default_factory=lambda: array("Q", [EMPTY]))
    _cached: dict[str, int] = field(default_factory=dict)
    _homes: dict[str, str] = field(default_factory=dict)
    _floors: dict[str, int] = field(default_factory=dict)

    @classmethod
    def resumed(
        cls, session_id: str, fence: int, records: Records, answer_position: int, slots: Sequence[str]
    ) -> Self:
        """The text of a stored session whose latest turn goes on, or is followed by another.

        Args:
            records: all of the session's, from position 0 on.
            answer_position: where the latest turn's answer begins.
            slots: the turn's, by which its records name experts.
        """
        text = cls(session_id, fence, records["token_id"].tolist())
        for record in to_token_records(records[answer_position:]):
            if record.source is TokenSource.EXPERT and record.expert < len(slots):
                text._raise_floor(slots[record.expert], record.epoch)
        return text

    def call(self, cache_name: str, deadline: float) -> StepCall:
        """The step that brings a cache up to date and asks for the last row."""
        start = min(self._cached.get(cache_name, 0), len(self.tokens) - 1)
        return StepCall(
            session_id=self.session_id,
            from_position=start,
            token_ids=self.tokens[start:],
            num_rows=1,
            fence=self.fence,
            prefix_digest=self._digest(start),
            deadline=deadline,
        )

    def cached_length(self, cache_name: str) -> int:
        """How many tokens a cache holds."""
        return self._cached.get(cache_name, 0)

    def has_cached(self, cache_name: str, length: int) -> None:
        """Remembers how many tokens a cache holds."""
        self._cached[cache_name] = length

    def lost(self, cache_name: str) -> None:
        """A cache has lost the session; it is sent all of it again."""
        self.num_replays += 1
        self._cached[cache_name] = 0

    def answered(self, slot: str, cache_name: str, epoch: int) -> bool:
        """A cache has answered for all tokens, serving a slot under an epoch of it.

        Returns:
            Whether it was sent the whole session because the one that had it could not be asked: that is a replay.
        """
        is_replay = not self._cached.get(cache_name) and self._homes.get(slot, cache_name) != cache_name
        self.num_replays += is_replay
        self._cached[cache_name] = len(self.tokens)
        self._homes[slot] = cache_name
        self._raise_floor(slot, epoch)
        return is_replay

    def home(self, slot: str) -> str | None:
        """The cache that has answered last for a slot in this turn."""
        return self._homes.get(slot)

    def floor(self, slot: str) -> int:
        """The highest epoch of a slot that took part; nothing of a lower one may follow."""
        return self._floors.get(slot, 0)

    def _raise_floor(self, slot: str, epoch: int) -> None:
        if epoch > self._floors.get(slot, 0):
            self._floors[slot] = epoch

    def _digest(self, position: int) -> int:
        """Digest of the tokens before `position`."""
        for index in range(len(self._digests) - 1, position):
            self._digests.append(digest(self.tokens[index : index + 1], self._digests[-1]))
        return self._digests[position]
