"""Asks a router how much each token of a gold answer would have been worth, in many ways at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from evaluation.judged import JudgedText, Opinion
from evaluation.questions import Question
from evaluation.systems.ways import Way
from fusionroute.client import RouterClient
from fusionroute.questions import ScoringOptions

MOST_WAYS = 32

EncodePair = Callable[[Question], tuple[Sequence[int], Sequence[int]]]
"""Token ids of a question's prompt, and of its gold answer with the end of sequence."""


@dataclass(frozen=True, slots=True)
class RouterJudge:
    """Judges gold answers by the running services.

    Attributes:
        ways: at most 32.
        encode: as the router would encode a prompt.
        exact: the same bits however requests are batched.
    """

    router: RouterClient
    ways: Sequence[Way]
    encode: EncodePair
    exact: bool = False

    async def judge(self, question: Question) -> JudgedText:
        """What each way would have written. Raises FusionRouteError as the services do."""
        prompt, answer = self.encode(question)
        ways = [way.options() for way in self.ways]
        own: ScoringOptions = {"combine": ways[0]["combine"], "exact": self.exact}
        tokens = await self.router.score([*prompt, *answer], from_position=len(prompt), ways=ways, **own)
        judged = [token.judgements for token in tokens]
        opinions = {
            way.name: Opinion(
                tuple(each[number].best_id for each in judged),
                tuple(each[number].logprob for each in judged),
                tuple(each[number].expert or "" for each in judged),
            )
            for number, way in enumerate(self.ways)
        }
        return JudgedText(tuple(answer), opinions)

    async def ask(self, question: Question) -> dict[str, Any]:
        """The same as JSON has it."""
        return (await self.judge(question)).to_json()
