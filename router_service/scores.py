"""What tokens are chosen from: the rows of one round, token by token."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace

from fusionroute.fusion import CombineRule, Decision, fuse
from fusionroute.sampling import Choice, Row, top_candidates
from fusionroute.short_rows import ShortRow
from router_service.asking import Answer
from router_service.drafting import Plan


@dataclass(frozen=True, slots=True)
class Candidates:
    """Best ids with their log-probabilities, by whom."""

    fused: list[Choice]
    expert: list[Choice]
    router: list[Choice]


@dataclass(frozen=True, slots=True)
class Scores:
    """What one token is chosen from.

    Attributes:
        picked: the router's decision.
        taken: the decision as it was carried out; another one where the picked expert was not there.
        router, expert: rows [V]; None of who was not asked.
        epoch: of the expert's slot; 0 without one.
        short: what is known of the expert's row, where only its highest logits were sent.
        whole: asks for that row.
        others: rows [V] of `taken.others`.
    """

    picked: Decision
    taken: Decision
    router: Row | None
    expert: Row | None
    epoch: int
    short: ShortRow | None = None
    whole: Callable[[], Awaitable[Answer]] | None = None
    others: tuple[Row, ...] = ()

    def fused(self, rule: CombineRule) -> Row:
        """The scores [V] that the token is chosen from; of whole rows."""
        return fuse(rule, self.taken, self.expert, self.router, self.others)

    @property
    def has_expert(self) -> bool:
        """Whether an expert takes part."""
        return self.expert is not None or self.short is not None

    async def with_whole_row(self) -> Scores:
        """The same with the expert's whole row. Raises FusionRouteError."""
        assert self.whole is not None
        answer = await self.whole()
        return replace(self, expert=answer.rows[0], epoch=answer.epoch, short=None, whole=None)

    def candidates(self, fused: Row, count: int) -> Candidates:
        """The `count` best ids of each row, and of the scores [V] that they were fused to."""
        return Candidates(
            fused=top_candidates(fused, count),
            expert=[] if self.expert is None else top_candidates(self.expert, count),
            router=[] if self.router is None else top_candidates(self.router, count),
        )

    @property
    def is_degraded(self) -> bool:
        """Whether somebody stood in for the picked expert."""
        return self.taken.expert != self.picked.expert


@dataclass(slots=True)
class Round:
    """The rows of a round.

    Attributes:
        plan: how it was made.
        draft: the tokens proposed.
        scores: of the next token, then of those after each drafted one, as far as rows could be had; at least one.
        router_seconds, expert_seconds: within their forwards.
    """

    plan: Plan
    draft: tuple[int, ...] = ()
    scores: list[Scores] = field(default_factory=list)
    router_seconds: float = 0.0
    expert_seconds: float = 0.0


def scored(
    picked: Decision,
    taken: Decision,
    router_row: Row | None,
    answer: Answer | None,
    row: int,
    others: tuple[Row, ...] = (),
) -> Scores:
    """Scores from one row of an expert's answer, and rows of others; without any of them the router's alone."""
    if answer is None:
        return Scores(picked, taken, router_row, None, 0, others=others)
    if answer.top:
        return Scores(picked, taken, router_row, None, answer.epoch, answer.top[row], answer.whole)
    return Scores(picked, taken, router_row, answer.rows[row], answer.epoch, others=others)
