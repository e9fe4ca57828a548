"""Scores, losses and accuracies stand apart: each with its own tables, pictures and axes, and its own better side."""

from __future__ import annotations

import io
import math
import random
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Text
from rich.console import Console

from evaluation.findings import ACCURACY, ALL, NLL, SCORE, Cell, Comparison, Findings, SystemNote
from evaluation.questions import Answer, Outcome, Question, Verdict
from evaluation.report import print_main_table, read_findings, write_report
from evaluation.report.forest import BETTER_COLOUR, WORSE_COLOUR
from evaluation.report.markdown import to_markdown
from evaluation.report.paper import Sheet, fixed_style
from evaluation.report.pictures import sheets
from evaluation.report.tables import comparisons_table, main_table, null_sentence
from evaluation.report.view import View
from evaluation.statistics.cells import accuracy_cells, cells, weighted_cells
from evaluation.statistics.comparing import accuracy_compare, compare
from evaluation.statistics.intervals import Estimate
from evaluation.statistics.verdicts import verdict_sentence
from evaluation.suites.asking import Heard
from evaluation.suites.config import Suite, TextTable
from evaluation.suites.results import findings_of
from fusionroute.errors import InvalidRequest

SUITE = Suite(
    name="mine", baseline="a", tokenizer="t", texts=(TextTable(name="code", file=Path("code.jsonl")),)
)
PAIR = [("a", "b")]


def text(number: int, title: str = "code") -> Question:
    return Question(f"{title}/{number}", title, "", cluster=f"{title}/{number}")


def seen(system: str, question: Question, num_tokens: int, num_right: int, logprob: float = -1.0) -> Outcome:
    answer = Answer("", True, num_tokens, logprob)
    return Outcome(question, system, 0, answer, Verdict(num_right / num_tokens))


def made(*, with_questions: bool = True, num_titles: int = 2) -> Findings:
    """Of three systems: a gives texts the most probability, by much more than b gives more of it than c."""
    systems = [SystemNote(name, f"system {name}", "served") for name in "abc"]
    draw = random.Random(1)
    views, answers = [], []
    for question in [text(number, f"text{title}") for title in range(num_titles) for number in range(30)]:
        num_tokens, hard = draw.randint(20, 60), draw.gauss(0, 0.3)
        for note, loss in zip(systems, (2.0, 2.2, 2.2), strict=True):
            logprob = -num_tokens * (loss + hard + draw.gauss(0, 0.05))
            num_right = round(num_tokens * (0.85 - 0.2 * loss + draw.gauss(0, 0.04)))
            views.append(seen(note.name, question, num_tokens, num_right, logprob))
    for number in range(40):
        for note, chance in zip(systems, (0.6, 0.55, 0.5), strict=True):
            verdict = Verdict(float(draw.random() < chance))
            answers.append(
                Outcome(Question(f"own/{number}", "own", "?"), note.name, 0, Answer("", True), verdict)
            )
    return findings_of(SUITE, Heard(systems, answers if with_questions else [], views), {})


@pytest.fixture(scope="module")
def mixed() -> Findings:
    return made()


def of(findings: Findings, measure: str) -> View:
    (view,) = [view for view in View(findings).by_measure if view.look.measure == measure]
    return view


def columns_of(sheet: Sheet) -> list[Axes]:
    """Without the legend."""
    return [axes for axes in sheet.figure.axes if axes.axison]


# -- token accuracy


def test_accuracy_is_right_tokens_over_tokens_not_the_mean_of_texts():
    outcomes = [seen("a", text(0), 10, 10), seen("a", text(1), 90, 0)]
    (found,) = accuracy_cells(outcomes, ["a"], [ALL])
    assert found.estimate.value == pytest.approx(0.1)
    assert (found.measure, found.num_questions) == (ACCURACY, 2)
    assert 0.0 <= found.estimate.low < 0.01 and found.estimate.high > 0.8, "two texts say little"


def test_texts_of_one_token_are_as_right_as_questions():
    right = [number % 3 == 0 for number in range(60)]
    tokens = [seen("a", text(n), 1, each) for n, each in enumerate(right)]
    tokens += [seen("b", text(n), 1, n % 2) for n in range(60)]
    assert accuracy_cells(tokens, "ab", [ALL]) == [
        replace(c, measure=ACCURACY) for c in cells(tokens, "ab", [ALL])
    ]
    (share,), (score,) = accuracy_compare(tokens, PAIR, [ALL]), compare(tokens, PAIR, [ALL])
    assert share.difference == score.difference and share.p_value == score.p_value
    assert (share.only_first, share.only_second) == (score.only_first, score.only_second)
    assert share.mcnemar is None and score.mcnemar == pytest.approx(share.p_value)


def test_tokens_of_one_text_are_not_taken_for_independent():
    draw = random.Random(3)
    outcomes = [seen("a", text(n), 100, round(100 * draw.uniform(0.2, 0.8))) for n in range(40)]
    (found,) = accuracy_cells(outcomes, ["a"], [ALL])
    deviation = np.std([each.verdict.score for each in outcomes], ddof=1)
    half = (found.estimate.high - found.estimate.low) / 2
    assert half == pytest.approx(2.02 * deviation / math.sqrt(40), rel=0.1)


def test_a_few_tokens_in_every_text_are_a_difference_that_can_be_shown():
    outcomes = [seen("a", text(n), 100, 51 + n % 3) for n in range(40)]
    outcomes += [seen("b", text(n), 100, 50) for n in range(40)]
    (found,) = accuracy_compare(outcomes, PAIR, [ALL])
    assert found.is_significant and found.detectable < found.difference.value == pytest.approx(0.01975)
    assert (found.only_first, found.only_second) == (40, 0)
    sentence = verdict_sentence(found)
    assert (
        sentence.startswith("a is ahead of b on all texts: +0.020 of the tokens") and "40 texts." in sentence
    )


# -- apart


def test_findings_of_texts_hold_both_measures(mixed: Findings):
    assert {each.measure for each in mixed.cells} == {SCORE, ACCURACY, NLL}
    (loss,) = weighted_cells([seen("a", text(n), 4, 1, -2.0) for n in range(3)], ["a"], [ALL])
    assert loss.estimate.value == pytest.approx(0.5)


def test_every_table_and_picture_is_of_one_measure(mixed: Findings, tmp_path: Path):
    written = write_report(mixed, tmp_path)
    report = (tmp_path / "report.md").read_text()
    headings = re.findall("^## (.*)$", report, re.MULTILINE)
    assert headings[:6] == [
        *("How systems did", "Differences"),
        *("How many tokens of texts systems get right", "Differences in token accuracy"),
        *("How probable systems find texts", "Differences in loss per token"),
    ]
    score, accuracy, loss = (report[report.index(f"## {headings[place]}") :] for place in (0, 2, 4))
    assert "| system | own (n = 40) | all (n = 40) |" in score.partition("## How many")[0]
    assert "| system | text0 (n = 30 texts) | text1 (n = 30 texts) | all (n = 60 texts) |" in accuracy
    assert "Less is better" in loss and "Less is better" not in score.partition("## How probable")[0]
    assert "Below zero the first is better" in loss and "Above zero" in accuracy
    assert sorted(path.name for path in written if path.suffix == ".png") == [
        f"report-{measure}{kind}-task.png"
        for measure in ("accuracy-", "", "nll-")
        for kind in ("differences", "forest")
    ]
    assert all(f"]({path.name})" in report for path in written if path.suffix == ".png")
    assert read_findings(written[-1]) == mixed


def test_a_report_of_texts_alone_has_no_scores(tmp_path: Path):
    write_report(made(with_questions=False, num_titles=5), tmp_path)
    report = (tmp_path / "report.md").read_text()
    assert "How systems did" not in report and "score" not in report
    assert "## Loss per token, by task" in report and "](report-nll-parts-task.png)" in report
    assert not (tmp_path / "report-forest.png").exists()


def test_the_least_loss_is_bold_where_its_lead_is_significant(mixed: Findings):
    view = of(mixed, NLL)
    (columns,) = view.narrow
    assert main_table(view, columns).bold == {(0, 1), (0, 2), (0, 3)}
    turned = replace(
        mixed,
        cells=tuple(
            replace(each, system={"a": "c", "c": "a"}.get(each.system, each.system)) for each in mixed.cells
        ),
    )
    assert main_table(of(turned, NLL), columns).bold == set(), "c leads, but the comparison says that a does"


def test_colours_and_words_of_differences_know_that_less_is_better(mixed: Findings):
    colours = {}
    with fixed_style():
        for picture, sheet in sheets(View(mixed)):
            if picture.file.startswith(("report-nll-diff", "report-accuracy-diff")):
                said = " ".join(each.get_text() for each in sheet.figure.findobj(Text))
                assert ("left of zero is better" in said) is (picture.measure == NLL)
                assert ("right of zero is better" in said) is (picture.measure == ACCURACY)
                faces = {line.get_markerfacecolor() for axes in columns_of(sheet) for line in axes.lines}
                colours[picture.measure] = faces & {BETTER_COLOUR, WORSE_COLOUR}
    # rows are the others minus a, which is the best of them by either measure
    assert colours == {NLL: {WORSE_COLOUR}, ACCURACY: {WORSE_COLOUR}}
    assert all(each.difference.value < 0 for each in of(mixed, NLL).findings.comparisons)


def test_axes_of_losses_are_made_for_losses_and_shares_keep_theirs(mixed: Findings):
    limits = {}
    with fixed_style():
        for picture, sheet in sheets(View(mixed)):
            if "forest" in picture.file:
                limits[picture.measure] = {axes.get_xlim() for axes in columns_of(sheet)}
    assert limits[SCORE] == limits[ACCURACY] == {(0.0, 1.0)}
    ((low, high),) = limits[NLL]
    assert 1.5 < low < 2.0 < 2.2 < high < 2.6


def test_no_text_stands_on_another_or_beyond_the_edge(mixed: Findings):
    long = replace(
        mixed, cells=tuple(replace(each, estimate=_times(each.estimate, 6.0)) if each.measure == NLL else each
                          for each in mixed.cells)
    )  # fmt: skip
    with fixed_style():
        for picture, sheet in sheets(View(long)):
            renderer = FigureCanvasAgg(sheet.figure).get_renderer()
            sheet.figure.draw_without_rendering()
            shown = [
                each for each in sheet.figure.findobj(Text) if each.get_visible() and each.get_text().strip()
            ]
            boxes = np.array([each.get_window_extent(renderer).extents for each in shown])
            low, high = boxes[:, None, :2], boxes[:, None, 2:]
            lapping = (np.minimum(high, high.swapaxes(0, 1)) - np.maximum(low, low.swapaxes(0, 1)) > 2).all(
                axis=-1
            )
            assert [
                (shown[one].get_text(), shown[other].get_text(), picture.file)
                for one, other in np.argwhere(np.triu(lapping, k=1))
            ] == []
            outside = (boxes[:, :2] < 0).any(axis=1) | (boxes[:, 2:] > sheet.figure.bbox.size).any(axis=1)
            assert [(shown[each].get_text(), picture.file) for each in np.flatnonzero(outside)] == []


def _times(estimate: Estimate, factor: float) -> Estimate:
    return Estimate(estimate.value * factor, estimate.low * factor, estimate.high * factor)


def test_the_terminal_shows_a_table_for_each_measure(mixed: Findings):
    console = Console(width=100, record=True, file=io.StringIO())
    print_main_table(mixed, console)
    shown = console.export_text()
    score, accuracy, loss = (
        shown.index(word) for word in ("Mean score", "Share of the tokens", "Negative log")
    )
    assert score < accuracy < loss and "less is better" in shown[loss:] and "text0" not in shown[:accuracy]


def test_a_measure_that_is_not_known_is_refused(mixed: Findings, tmp_path: Path):
    odd = replace(mixed, cells=(Cell("a", ALL, 1, Estimate(1, 1, 1), {0: 1}, "speed"),))
    with pytest.raises(InvalidRequest, match="measure = 'speed' is not allowed: one of score, accuracy, nll"):
        write_report(odd, tmp_path)


# -- what cannot be shown, and McNemar's p


def compared(**changes: object) -> Comparison:
    plain = Comparison(
        first="a", second="b", stratum=ALL, num_questions=100, num_clusters=100,
        difference=Estimate(0.2, 0.1, 0.3), over_seeds=None, mixed=None, only_first=25, only_second=5,
        p_value=0.2, p_adjusted=0.4, detectable=0.137, per_seed={0: 0.2}, mcnemar=0.03,
    )  # fmt: skip
    return replace(plain, **changes)  # type: ignore[arg-type]


def test_where_no_difference_can_be_shown_that_is_said_in_words(mixed: Findings):
    few = compared(detectable=math.inf, num_clusters=4, num_questions=4, mcnemar=None)
    view = View(replace(mixed, comparisons=(few,)))
    assert comparisons_table(view, [few]).rows[0][-1] == "none can be shown"
    assert null_sentence(view, few).endswith("after Holm); these 4 questions cannot show any.")
    assert "inf" not in to_markdown(view, [])


def test_a_null_result_on_texts_is_told_in_its_unit(mixed: Findings):
    null = compared(measure=NLL, mcnemar=None)
    sentence = null_sentence(View(mixed), null)
    assert "on all texts: no difference shown (+0.200 [+0.100, +0.300] nats per token" in sentence
    assert "these 100 texts would show one of 0.137 nats per token" in sentence


@pytest.mark.parametrize(
    ("comparison", "is_shown"),
    [
        (compared(), False),
        (compared(num_clusters=50), True),
        (compared(per_seed={1: 0.2, 2: 0.2}), True),
        (compared(num_clusters=50, measure=NLL, mcnemar=None), False),
    ],
)
def test_mcnemars_p_stands_beside_ours_where_it_is_another_test(
    mixed: Findings, comparison: Comparison, is_shown: bool
):
    view = View(replace(mixed, cells=(), comparisons=(comparison,)))
    table = comparisons_table(view, [comparison])
    assert ("McNemar's p, unadjusted" in table.heads) is is_shown
    assert ("0.030" in table.rows[0]) is is_shown
    assert len(table.heads) == len(table.rows[0])
    text = to_markdown(view, [])
    assert ("sign-flip test" in text) is (is_shown or comparison.measure == NLL)
