"""What the judgements say: a win rate, how sure it is, and how far the judge can be believed. Pure."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from evaluation.judging.judgements import Judgement, Order, PairVerdict, last_judgements, verdict_of
from evaluation.judging.pairs import AnswerPair
from evaluation.judging.prompting import Choice
from evaluation.statistics.intervals import Estimate, paired_difference, wilson_interval
from evaluation.statistics.significance import mcnemar


@dataclass(frozen=True, slots=True)
class Tally:
    """Verdicts on pairs, every repeat counted.

    Attributes:
        group: the subset, "" = all.
        num_prompts: different prompts; pairs of one prompt are resampled together.
        verdicts: how often each was given.
        win_rate: of the first answers among judged pairs, ties and inconsistent verdicts as half; None without any.
        least, most: the win rate if all unjudged pairs were lost, or won.
        consistent: share of the judged pairs about which both orders agree, with Wilson's interval.
        prompts_won, prompts_lost: prompts whose verdicts together favour the first answer, or the second.
        p_value: of the exact sign test over those prompts, two-sided; the same as McNemar's.
    """

    group: str
    num_prompts: int
    verdicts: dict[PairVerdict, int]
    win_rate: Estimate | None
    least: float
    most: float
    consistent: Estimate | None
    prompts_won: int
    prompts_lost: int
    p_value: float

    @property
    def num_verdicts(self) -> int:
        """All of them, unjudged pairs too."""
        return sum(self.verdicts.values())

    @property
    def num_judged(self) -> int:
        """Those with a verdict that could be read."""
        return self.num_verdicts - self.verdicts[PairVerdict.UNJUDGED]

    @property
    def right(self) -> Estimate:
        """Share of wins among all verdicts, with Wilson's interval: the judge's accuracy where the first is better."""
        return wilson_interval(self.verdicts[PairVerdict.WIN], self.num_verdicts)


@dataclass(frozen=True, slots=True)
class Behaviour:
    """How the judge replied, whatever it was shown.

    Attributes:
        num_asks: questions asked to their end.
        num_unparsable_replies: attempts whose reply could not be read.
        num_mended: asks whose second attempt could be read.
        num_unparsable, num_too_long: asks without a verdict, and why.
        num_cut: replies that ran out of tokens.
        chose_shown_first: share of "A" among the replies "A" and "B", with Wilson's interval; 0.5 is without bias,
            since every pair is shown in both orders; None without such replies.
        num_first_twice, num_second_twice: pairs where it chose the answer shown first in both orders, or second.
        num_ties: asks answered with a tie.
    """

    num_asks: int
    num_unparsable_replies: int
    num_mended: int
    num_unparsable: int
    num_too_long: int
    num_cut: int
    chose_shown_first: Estimate | None
    num_first_twice: int
    num_second_twice: int
    num_ties: int

    @property
    def is_biased(self) -> bool:
        """Whether the interval of `chose_shown_first` leaves out one half."""
        share = self.chose_shown_first
        return share is not None and not share.low <= 0.5 <= share.high


def tally(
    pairs: Sequence[AnswerPair], judgements: Iterable[Judgement], num_repeats: int, group: str = ""
) -> Tally:
    """Counts the pairs of a group that have been judged in both orders.

    Raises:
        ValueError: none of them has.
    """
    judged = last_judgements(judgements)
    prompts, verdicts = list[str](), list[PairVerdict]()
    for pair in pairs:
        for repeat in range(num_repeats):
            verdict = verdict_of(pair, repeat, judged)
            if verdict is not None:
                prompts.append(pair.prompt)
                verdicts.append(verdict)
    if not verdicts:
        raise ValueError("no pair has been judged in both orders")
    counts = Counter(verdicts)
    scored = [(prompt, each.score) for prompt, each in zip(prompts, verdicts, strict=True)]
    known = [(prompt, score) for prompt, score in scored if score is not None]
    leanings = _leanings(known)
    won, lost = sum(lean > 0 for lean in leanings), sum(lean < 0 for lean in leanings)
    total, unknown = sum(score for _, score in known), counts[PairVerdict.UNJUDGED]
    agreed = len(known) - counts[PairVerdict.INCONSISTENT]
    return Tally(
        group,
        len(set(prompts)),
        {each: counts[each] for each in PairVerdict},
        _mean(known) if known else None,
        total / len(verdicts),
        (total + unknown) / len(verdicts),
        wilson_interval(agreed, len(known)) if known else None,
        won,
        lost,
        mcnemar(won, lost),
    )


def behaviour(judgements: Sequence[Judgement]) -> Behaviour:
    """How the judge replied."""
    last = last_judgements(judgements)
    ends = [each for each in last.values() if each.is_last]
    choices = Counter(each.choice for each in ends)
    num_first, num_second = choices[Choice.SHOWN_FIRST], choices[Choice.SHOWN_SECOND]
    decided = num_first + num_second
    both: dict[tuple[str, int], dict[Order, Choice | None]] = defaultdict(dict)
    for each in ends:
        both[each.ask.pair, each.ask.repeat][each.ask.order] = each.choice
    twice = Counter(tuple(of_pair.values()) for of_pair in both.values() if len(of_pair) == len(Order))
    return Behaviour(
        num_asks=len(ends),
        num_unparsable_replies=sum(each.choice is Choice.UNPARSABLE for each in judgements),
        num_mended=sum(each.attempt > 0 and each.choice in _READ for each in ends),
        num_unparsable=choices[Choice.UNPARSABLE],
        num_too_long=choices[None],
        num_cut=sum(each.is_cut for each in judgements),
        chose_shown_first=wilson_interval(num_first, decided) if decided else None,
        num_first_twice=twice[Choice.SHOWN_FIRST, Choice.SHOWN_FIRST],
        num_second_twice=twice[Choice.SHOWN_SECOND, Choice.SHOWN_SECOND],
        num_ties=choices[Choice.TIE],
    )


_READ = frozenset({Choice.SHOWN_FIRST, Choice.SHOWN_SECOND, Choice.TIE})


def _leanings(known: Iterable[tuple[str, float]]) -> list[float]:
    """For each prompt, by how much its verdicts favour the first answer."""
    leaning: dict[str, float] = defaultdict(float)
    for prompt, score in known:
        leaning[prompt] += score - 0.5
    return list(leaning.values())


def _mean(known: Sequence[tuple[str, float]]) -> Estimate:
    """With the interval of the bootstrap over prompts; Wilson's where all are won, or all lost."""
    prompts, scores = zip(*known, strict=True)
    if len(set(scores)) == 1 and scores[0] != 0.5:  # resampling what never varies would claim certainty
        number = len(set(prompts))
        return wilson_interval(number if scores[0] else 0, number)
    return paired_difference(scores, [0.0] * len(scores), prompts)
