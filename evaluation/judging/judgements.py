"""Single judgements, and what two of them, one in each order, say about a pair."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum

from evaluation.judging.pairs import AnswerPair
from evaluation.judging.prompting import Choice

NUM_ATTEMPTS = 2


class Order(StrEnum):
    """Whose answer is shown as answer A."""

    FIRST_AS_A = "first_as_a"
    SECOND_AS_A = "second_as_a"


@dataclass(frozen=True, slots=True)
class Ask:
    """One question to a judge, until it is answered or given up.

    Attributes:
        pair: id.
        repeat: from 0; each has seeds of its own.
    """

    pair: str
    order: Order
    repeat: int


@dataclass(frozen=True, slots=True)
class Judgement:
    """What a judge replied to one attempt at an ask.

    Attributes:
        attempt: 0, or 1 after a reply that could not be read.
        seed, temperature: it was drawn with.
        choice: None where the judge's server refused the question as too long for it.
        reply: its words; the server's where it refused.
        is_cut: whether the reply ran out of tokens.
    """

    ask: Ask
    attempt: int
    seed: int
    temperature: float
    choice: Choice | None
    reply: str
    is_cut: bool = False

    @property
    def is_last(self) -> bool:
        """Whether the ask needs no further attempt."""
        return self.choice is not Choice.UNPARSABLE or self.attempt + 1 >= NUM_ATTEMPTS


class PairVerdict(StrEnum):
    """What both orders together say of the first answer."""

    WIN = "win"
    LOSS = "loss"
    TIE = "tie"
    INCONSISTENT = "inconsistent"
    """The orders disagree; counts as a tie."""
    UNJUDGED = "unjudged"
    """In at least one order there is no verdict that could be read."""

    @property
    def score(self) -> float | None:
        """1 for a win, 1/2 for a tie; None where it is not known."""
        return _SCORES[self]


_SCORES = {
    PairVerdict.WIN: 1.0,
    PairVerdict.LOSS: 0.0,
    PairVerdict.TIE: 0.5,
    PairVerdict.INCONSISTENT: 0.5,
    PairVerdict.UNJUDGED: None,
}


def last_judgements(judgements: Iterable[Judgement]) -> dict[Ask, Judgement]:
    """The judgement of the latest attempt at each ask."""
    found: dict[Ask, Judgement] = {}
    for each in judgements:
        if each.ask not in found or each.attempt > found[each.ask].attempt:
            found[each.ask] = each
    return found


def verdict_of(pair: AnswerPair, repeat: int, judged: Mapping[Ask, Judgement]) -> PairVerdict | None:
    """What both orders say, a tie where there is nothing to choose; None while one of them has not been asked."""
    if pair.is_same:
        return PairVerdict.TIE
    said = [judged.get(Ask(pair.id, order, repeat)) for order in Order]
    finished = [each for each in said if each is not None and each.is_last]
    if len(finished) < len(said):
        return None
    verdicts = {_about_first(each) for each in finished}
    if PairVerdict.UNJUDGED in verdicts:
        return PairVerdict.UNJUDGED
    return verdicts.pop() if len(verdicts) == 1 else PairVerdict.INCONSISTENT


def _about_first(judgement: Judgement) -> PairVerdict:
    if judgement.choice is None or judgement.choice is Choice.UNPARSABLE:
        return PairVerdict.UNJUDGED
    if judgement.choice is Choice.TIE:
        return PairVerdict.TIE
    prefers_a = judgement.choice is Choice.SHOWN_FIRST
    return PairVerdict.WIN if prefers_a == (judgement.ask.order is Order.FIRST_AS_A) else PairVerdict.LOSS
