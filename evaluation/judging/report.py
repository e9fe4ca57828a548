"""What a judge found, as JSON and as Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from evaluation.judging.judgements import Judgement, PairVerdict, last_judgements, verdict_of
from evaluation.judging.pairs import AnswerPair
from evaluation.judging.running import Plan
from evaluation.judging.scores import Behaviour, Tally, behaviour, tally
from evaluation.statistics.intervals import Estimate

_VERDICTS = (
    PairVerdict.WIN,
    PairVerdict.LOSS,
    PairVerdict.TIE,
    PairVerdict.INCONSISTENT,
    PairVerdict.UNJUDGED,
)


@dataclass(frozen=True, slots=True)
class JudgingReport:
    """A finished run.

    Attributes:
        first, second: names of whose answers they are; "better" and "worse" where the better answer is known.
        is_calibration: whether the first answer of each pair is known to be better, so that wins are right verdicts.
        judge: identity of the model that judged.
        total: all pairs.
        groups: each group of its own; empty where there is one or none.
        num_left_out: answers without a counterpart in the other file, or labelled pairs of twice the same answer.
        num_same: pairs of twice the same answer, which are ties that the judge was not asked about.
        seeds: that were drawn with.
        rows: verdict of each pair and repeat, in the order of the pairs.
    """

    first: str
    second: str
    is_calibration: bool
    judge: str
    template: str
    reply_form: str
    temperature: float
    seeds: tuple[int, ...]
    total: Tally
    groups: tuple[Tally, ...]
    behaviour: Behaviour
    num_left_out: int
    num_same: int
    rows: tuple[tuple[str, int, PairVerdict], ...]

    def to_json(self) -> dict[str, Any]:
        """Everything, for programs."""
        told = asdict(self)
        told["total"], told["groups"] = _json(self.total), [_json(each) for each in self.groups]
        told["rows"] = [
            {"id": key, "repeat": repeat, "verdict": verdict} for key, repeat, verdict in self.rows
        ]
        return told

    def to_markdown(self) -> str:
        """The same for people, but for the single rows."""
        lines = [f"# {self._title()}", "", *self._facts(), "", *self._table(), "", *self._findings()]
        return "\n".join([*lines, "", "## How the judge replied", "", *self._behaviour(), ""])

    def _title(self) -> str:
        return (
            "A judge before known answers" if self.is_calibration else f"{self.first} against {self.second}"
        )

    def _facts(self) -> list[str]:
        seeds = ", ".join(map(str, self.seeds))
        return [
            f"Judge: {self.judge}. Template {self.template}, replies as {self.reply_form}, temperature "
            f"{self.temperature:g}, seeds {seeds}. Every pair is shown in both orders; where they disagree the pair is "
            "inconsistent and counts as a tie. Intervals are 95 %."
        ]

    def _table(self) -> list[str]:
        tallies = [*self.groups, self.total]
        names = ["right", "wrong"] if self.is_calibration else ["win", "loss"]
        share = "right in both orders" if self.is_calibration else "win rate, ties half"
        headings = ["pairs", *names, "tie", "inconsistent", "unjudged", share]
        rows = [
            [
                each.group or "all",
                *(str(each.verdicts[verdict]) for verdict in _VERDICTS),
                _shown(each.right if self.is_calibration else each.win_rate),
            ]
            for each in tallies
        ]
        rule = ["---", *["---:"] * (len(headings) - 1)]
        return [f"| {' | '.join(row)} |" for row in ([headings, rule, *rows])]

    def _findings(self) -> list[str]:
        total = self.total
        unjudged = total.verdicts[PairVerdict.UNJUDGED]
        lines = []
        if self.is_calibration:
            lines.append(
                f"- Right, ties and inconsistent verdicts as half: {_shown(total.win_rate)}; a coin has 0.500."
            )
        elif total.win_rate is None:
            lines.append("- No pair has a verdict.")
        elif total.win_rate.low <= 0.5 <= total.win_rate.high:
            lines.append("- No difference is shown: the interval of the win rate holds one half.")
        else:
            better = self.first if total.win_rate.value > 0.5 else self.second
            lines.append(f"- The judge prefers {better}: the interval of the win rate leaves out one half.")
        lines.append(
            f"- Sign test over {total.num_prompts} prompts: {total.prompts_won} for {self.first}, {total.prompts_lost} "
            f"for {self.second}, p = {total.p_value:.3g}."
        )
        if unjudged:
            lines.append(
                f"- {unjudged} of {total.num_verdicts} verdicts are missing. Were all of them lost the win rate would "
                f"be {total.least:.3f}, were all of them won {total.most:.3f}."
            )
        if self.num_left_out:
            why = "pairs have the same answer twice" if self.is_calibration else "answers have no counterpart"
            lines.append(f"- {self.num_left_out} {why} and were left out.")
        if self.num_same:
            lines.append(
                f"- {self.num_same} pairs have the same answer twice: ties that nobody was asked about."
            )
        return lines

    def _behaviour(self) -> list[str]:
        seen = self.behaviour
        bias = "" if seen.chose_shown_first is None else ", biased" if seen.is_biased else ", no bias shown"
        return [
            f"- Both orders agree on {_shown(self.total.consistent)} of the judged pairs.",
            f"- Position: of the replies that chose, {_shown(seen.chose_shown_first)} chose the answer shown first"
            f"{bias}. In both orders the answer shown first: {seen.num_first_twice} pairs; shown second: "
            f"{seen.num_second_twice}.",
            f"- {seen.num_asks} questions, {seen.num_ties} answered with a tie.",
            f"- {seen.num_unparsable_replies} replies could not be read; {seen.num_mended} questions were answered at "
            f"the second attempt, {seen.num_unparsable} not. {seen.num_cut} replies ran out of tokens.",
            f"- {seen.num_too_long} questions were too long for the judge.",
        ]


def report_of(
    pairs: Sequence[AnswerPair],
    judgements: Sequence[Judgement],
    plan: Plan,
    *,
    judge: str,
    names: tuple[str, str],
    is_calibration: bool = False,
    num_left_out: int = 0,
) -> JudgingReport:
    """Counts what the journal of a finished run holds; repeats beyond those of the plan are left aside.

    Raises:
        ValueError: no pair has been judged in both orders.
    """
    mine = [each for each in judgements if each.ask.repeat < plan.num_repeats]
    groups = list(dict.fromkeys(pair.group for pair in pairs))
    judged = last_judgements(mine)
    repeats = range(plan.num_repeats)
    verdicts = [(pair.id, each, verdict_of(pair, each, judged)) for pair in pairs for each in repeats]
    by_group = [
        tally([pair for pair in pairs if pair.group == group], mine, plan.num_repeats, group)
        for group in groups
    ]
    return JudgingReport(
        *names,
        is_calibration=is_calibration,
        judge=judge,
        template=plan.prompt.digest,
        reply_form=plan.prompt.form.value,
        temperature=plan.temperature,
        seeds=tuple(sorted({each.seed for each in mine})),
        total=tally(pairs, mine, plan.num_repeats),
        groups=tuple(by_group) if len(groups) > 1 else (),
        behaviour=behaviour(mine),
        num_left_out=num_left_out,
        num_same=sum(pair.is_same for pair in pairs),
        rows=tuple((key, repeat, verdict) for key, repeat, verdict in verdicts if verdict is not None),
    )


def _json(tally: Tally) -> dict[str, Any]:
    told = asdict(tally)
    told["verdicts"] = {verdict.value: number for verdict, number in tally.verdicts.items()}
    return {**told, "num_verdicts": tally.num_verdicts, "right": asdict(tally.right)}


def _shown(estimate: Estimate | None) -> str:
    if estimate is None:
        return "-"
    return f"{estimate.value:.3f} [{estimate.low:.3f}, {estimate.high:.3f}]"
