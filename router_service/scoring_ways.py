"""Judging the tokens of a prompt in several ways from the same forwards.

The router's rows and those of each expert that some way picks are asked for once; every way then decides and fuses on
its own. So what many rules say about a text costs one forward of each model for each chunk, not one for each rule.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fusionroute.background import end_task
from fusionroute.fusion import CombineRule, Decision, decide_all, fuse, needs_router
from fusionroute.sampling import logprob, logsumexps
from router_service.asking import Answer, ask
from router_service.ensemble import Ensemble
from router_service.scores import Scores, scored
from router_service.session_text import Text, Wanted
from router_service.turn_request import Turn

MOST_STACKED = 4096
"""Rows of no more numbers than these are judged all at once."""

_WEIGHED_BY_TOKEN = (CombineRule.GATED_SUM, CombineRule.MIXTURE)
"""Rules by which tokens of the same expert are fused with weights of their own."""


@dataclass(frozen=True, slots=True)
class Judgement:
    """A token as one way sees it.

    Attributes:
        logprob: natural log of its probability.
        best_id: the way's own first choice.
        expert: index of the one that took part; None = the router alone.
    """

    logprob: float
    best_id: int
    expert: int | None


@dataclass(frozen=True, slots=True)
class Rows:
    """What the models say about a chunk: row j scores its token j.

    Attributes:
        decisions: by way, then by token of the chunk.
        router: None where no way needs it.
        experts: by index, of those that some way picks, or needs beside them.
        places: by expert, which row of its answer scores token j.
    """

    decisions: Sequence[Sequence[Decision]]
    router: Answer | None
    experts: dict[int, Answer]
    places: dict[int, dict[int, int]]

    @property
    def width(self) -> int:
        """Of a row."""
        answers = [*self.experts.values(), *([] if self.router is None else [self.router])]
        return int(answers[0].rows.shape[1])

    def of(self, expert: int, places: Sequence[int]) -> NDArray[np.float32]:
        """An expert's rows [n, V] for the tokens at these places of the chunk."""
        answered = self.places[expert]
        return self.experts[expert].rows[[answered[place] for place in places]]

    def seen_by(self, way: int, place: int) -> Scores:
        """What a way, by its number, judges the token at a place of the chunk by."""
        decision = self.decisions[way][place]
        router_row = None if self.router is None else self.router.rows[place]
        others = tuple(self.experts[each].rows[self.places[each][place]] for each in decision.others)
        if decision.expert is None:
            return scored(decision, decision, router_row, None, 0, others)
        row = self.places[decision.expert][place]
        return scored(decision, decision, router_row, self.experts[decision.expert], row, others)


async def ask_rows(ensemble: Ensemble, ways: Sequence[Turn], text: Text, chunk: Sequence[int]) -> Rows:
    """The rows that judge a chunk of tokens that follow a text.

    Raises:
        FusionRouteError: a model cannot be asked.
    """
    draft, rows = tuple(chunk[:-1]), range(len(chunk))
    exact = any(way.exact for way in ways)
    router = None
    position = len(text.tokens)
    if any(needs_router(way.rule, way.given_expert(position)) for way in ways):
        wanted = Wanted(draft, rows, exact=exact)
        router = await ask(ensemble.router, text, ensemble.router_patience, wanted)
    decisions = decide_all(
        [way.rule for way in ways],
        ensemble.layout,
        None if router is None else router.head_scores,
        [way.given_experts(position, len(chunk)) for way in ways],
    )
    needed: dict[int, set[int]] = {}
    for of_way in decisions:
        for row, decision in enumerate(of_way):
            if decision.expert is not None:
                needed.setdefault(decision.expert, set()).add(row)
            for other in decision.others:
                needed.setdefault(other, set()).add(row)
    tasks = {
        expert: asyncio.create_task(
            ask(
                ensemble.models[expert],
                text,
                ensemble.expert_patience,
                Wanted(draft, sorted(of_expert), exact=exact),
            )
        )
        for expert, of_expert in needed.items()
    }
    try:
        experts = {expert: await task for expert, task in tasks.items()}
    finally:
        for task in tasks.values():
            await end_task(task)
    places = {
        expert: {row: place for place, row in enumerate(sorted(rows))} for expert, rows in needed.items()
    }
    return Rows(decisions, router, experts, places)


def judge(rows: Rows, ways: Sequence[Turn], chunk: Sequence[int]) -> list[list[Judgement]]:
    """What each way says about each token of the chunk: first by token, then by way."""
    by_way = [_judge(rows, number, way, chunk) for number, way in enumerate(ways)]
    return [list(of_token) for of_token in zip(*by_way, strict=True)]


def num_rows(ways: Sequence[Turn], num_experts: int) -> int:
    """Rows that may be in memory at a time for one token."""
    if any(way.rule.asks_several for way in ways):
        return 2 + num_experts
    return 1 + min(num_experts, len(ways))


def _judge(rows: Rows, number: int, way: Turn, chunk: Sequence[int]) -> list[Judgement]:
    experts = [decision.expert for decision in rows.decisions[number]]
    if rows.width > MOST_STACKED:  # one at a time: a copy would cost more than calls that are saved
        fused = (rows.seen_by(number, place).fused(way.rule) for place in range(len(chunk)))
        return [
            Judgement(logprob(row, token), int(np.argmax(row)), expert)
            for row, token, expert in zip(fused, chunk, experts, strict=True)
        ]
    stacked = fused_rows(rows, number, way.rule)
    picked = stacked[np.arange(len(chunk)), chunk].tolist()
    return [
        Judgement(score - total, best, expert)
        for score, total, best, expert in zip(
            picked, logsumexps(stacked), stacked.argmax(axis=1).tolist(), experts, strict=True
        )
    ]


def fused_rows(rows: Rows, number: int, rule: CombineRule) -> NDArray[np.float32]:
    """Fused scores [T, V] of a chunk's T tokens in one way, those of the same expert at a time."""
    decisions = rows.decisions[number]
    fused = np.empty((len(decisions), rows.width), np.float32)
    if rule in _WEIGHED_BY_TOKEN:
        for place in range(len(decisions)):
            fused[place] = rows.seen_by(number, place).fused(rule)
        return fused
    groups: dict[int | None, list[int]] = {}
    for place, decision in enumerate(decisions):
        groups.setdefault(decision.expert, []).append(place)
    for expert, places in groups.items():
        of_expert = None if expert is None else rows.of(expert, places)
        of_router = None if rows.router is None else rows.router.rows[places]
        decision = decisions[places[0]]
        others = [rows.of(other, places) for other in decision.others]
        fused[places] = fuse(rule, decision, of_expert, of_router, others)
    return fused
