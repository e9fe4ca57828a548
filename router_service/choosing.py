"""Choosing tokens from their rows: from an expert's highest logits where they suffice, else from whole rows."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from functools import partial

from fusionroute.fusion import CombineRule
from fusionroute.sampling import Choice, Row, SeenTokens, choose
from fusionroute.short_rows import can_choose, pick_if_certain
from router_service import metrics
from router_service.constraints import Allowed, ConstrainedAnswer
from router_service.records import UNKNOWN_LOGPROB
from router_service.scores import Candidates, Scores
from router_service.turn_request import Turn, Wishes

LARGE_ROW = 16384
"""Sampling from rows longer than this takes milliseconds, which the event loop is spared."""


@dataclass(frozen=True, slots=True)
class TokenChooser:
    """Chooses tokens as a turn asks for.

    Attributes:
        constrained: which tokens may be chosen; None = all.
    """

    turn: Turn
    wishes: Wishes
    constrained: ConstrainedAnswer | None = None

    @property
    def can_be_short(self) -> bool:
        """Whether an expert's highest logits may suffice for this turn's tokens."""
        return can_choose(self.turn.sampling) and not (
            self.turn.rule is CombineRule.MIXTURE
            or self.turn.rule.asks_several
            or self.wishes.num_top_candidates
            or self.turn.constraint is not None  # what is allowed may have low scores only
        )

    def is_slow(self, row: Row) -> bool:
        """Whether choosing from a row takes long enough to be kept off the event loop."""
        return len(row) > LARGE_ROW and self.turn.sampling.temperature != 0.0

    async def choose_whole(
        self, scores: Scores, position: int, seen: SeenTokens
    ) -> tuple[Choice, Candidates | None]:
        """The token for `position` of the session, with the best candidates where they are wanted.

        Raises:
            SessionStateError: CONSTRAINT_FAILED, none may be chosen.
        """
        allowed = None if self.constrained is None else self.constrained.allowed
        fused = scores.fused(self.turn.rule)
        if self.is_slow(fused) or (self.wishes.num_top_candidates and len(fused) > LARGE_ROW):
            return await asyncio.to_thread(self._choose, fused, scores, position, seen, allowed)
        return self._choose(fused, scores, position, seen, allowed)

    def _choose(
        self, fused: Row, scores: Scores, position: int, seen: SeenTokens, allowed: Allowed | None
    ) -> tuple[Choice, Candidates | None]:
        choice = choose(fused, self.turn.sampling, position, seen, allowed)
        count = self.wishes.num_top_candidates
        return choice, scores.candidates(fused, count) if count else None

    async def choose_short(self, scores: Scores, position: int, seen: SeenTokens) -> Choice | None:
        """The token as far as an expert's highest logits say it for certain; its probability they do not say."""
        assert scores.short is not None
        complement = scores.taken.complement
        router_row = None if self.turn.rule in (CombineRule.ROUTE, CombineRule.SELECT) else scores.router
        token_id = None
        if complement > 0.0:
            pick = partial(
                pick_if_certain,
                scores.short,
                router_row,
                self.turn.sampling,
                position,
                seen,
                complement=complement,
            )
            is_slow = scores.router is not None and self.is_slow(scores.router)
            token_id = await asyncio.to_thread(pick) if is_slow else pick()
        metrics.SHORT_REPLIES.labels("whole_row" if token_id is None else "certain").inc()
        return None if token_id is None else Choice(token_id, UNKNOWN_LOGPROB)
