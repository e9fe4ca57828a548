"""A session's tokens as its writer sees them, and what it remembers of the models that have cached them."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Self

from fusionroute.engine import Draft, StepCall, digest
from fusionroute.engine.digest import EMPTY
from router_service.records import Records, TokenSource, to_token_records


@dataclass(frozen=True, slots=True)
class Wanted:
    """Which rows are asked of a model.

    Row j is the one after the text and the first j tokens of a draft: row 0 scores the next token of the text.

    Attributes:
        draft: tokens that may follow the text; at least as many as the last of `rows`.
        rows: ascending.
        drafting: the model is to go on by itself after the last of `rows`; its rows for what it drafts come along.
        exact: the rows are to be the same bits whatever else the model computes.
        top_logits: so many of the highest logits of each row suffice, where whole rows are dear; 0 = they do not.
    """

    draft: Sequence[int] = ()
    rows: Sequence[int] = (0,)
    drafting: Draft | None = None
    exact: bool = False
    top_logits: int = 0

    @property
    def num_fed(self) -> int:
        """Tokens of the draft that have to be fed."""
        return self.rows[-1]


NEXT_ROW = Wanted()
"""The row for the next token of the text."""


@dataclass(slots=True)
class Text:
    """A session's tokens and how far each model has cached them.

    Attributes:
        session_id: under which the models cache it.
        fence: the writer's fencing token.
        tokens: all tokens, prompts included.
        num_replays: times that a model had lost the session and was sent all of it again.
        num_retries: times that a model had to be asked again for any other reason.
        asked: names of the caches that this writer has asked.
        may_be_anywhere: earlier writers have asked others, nobody knows which.
    """

    session_id: str
    fence: int
    tokens: list[int]
    num_replays: int = 0
    num_retries: int = 0
    asked: set[str] = field(default_factory=set)
    may_be_anywhere: bool = False
    _digests: array[int] = field(default_factory=lambda: array("Q", [EMPTY]))
    _cached: dict[str, int] = field(default_factory=dict)
    _ahead: dict[str, tuple[int, ...]] = field(default_factory=dict)  # what a cache holds beyond `_cached`
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
        text = cls(session_id, fence, records["token_id"].tolist(), may_be_anywhere=True)
        for record in to_token_records(records[answer_position:]):
            if record.source is TokenSource.EXPERT and record.expert < len(slots):
                text._raise_floor(slots[record.expert], record.epoch)
        return text

    def call(self, cache_name: str, deadline: float, wanted: Wanted = NEXT_ROW) -> StepCall:
        """The step that brings a cache up to date and asks for rows."""
        self.asked.add(cache_name)
        last = len(self.tokens) - 1
        start = min(self.cached_length(cache_name), last + wanted.rows[0])
        first_row = last + wanted.rows[0] - start
        is_one_piece = wanted.num_fed - wanted.rows[0] + 1 == len(wanted.rows)
        return StepCall(
            session_id=self.session_id,
            from_position=start,
            token_ids=[*self.tokens[start:], *wanted.draft[: wanted.num_fed]],
            num_rows=len(wanted.rows) if is_one_piece else 0,
            row_indices=() if is_one_piece else [first_row + row - wanted.rows[0] for row in wanted.rows],
            fence=self.fence,
            prefix_digest=self._digest(start),
            deadline=deadline,
            exact=wanted.exact,
            draft=wanted.drafting,
        )

    def cached_length(self, cache_name: str) -> int:
        """How many tokens of the text a cache holds."""
        length = self._cached.get(cache_name, 0)
        ahead = self._ahead.get(cache_name)
        if not ahead or length == len(self.tokens):
            return length
        for count, (written, drafted) in enumerate(zip(self.tokens[length:], ahead, strict=False)):
            if written != drafted:
                del self._ahead[cache_name]
                self._cached[cache_name] = length + count
                return length + count
        count = min(len(ahead), len(self.tokens) - length)
        self._cached[cache_name], self._ahead[cache_name] = length + count, ahead[count:]
        return length + count

    def has_cached(self, cache_name: str, length: int) -> None:
        """Remembers how many tokens a cache holds."""
        self._cached[cache_name] = length
        self._ahead.pop(cache_name, None)

    def lost(self, cache_name: str) -> None:
        """A cache has lost the session; it is sent all of it again."""
        self.num_replays += 1
        self.has_cached(cache_name, 0)

    def answered(
        self,
        slot: str,
        cache_name: str,
        epoch: int,
        wanted: Wanted = NEXT_ROW,
        drafted_ids: Sequence[int] = (),
    ) -> bool:
        """A cache has answered for all tokens, serving a slot under an epoch of it.

        Returns:
            Whether it was sent the whole session because the one that had it could not be asked: that is a replay.
        """
        is_replay = not self._cached.get(cache_name) and self._homes.get(slot, cache_name) != cache_name
        self.num_replays += is_replay
        self._cached[cache_name] = len(self.tokens)
        self._ahead[cache_name] = (*wanted.draft[: wanted.num_fed], *drafted_ids)
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
