"""Scores in one file: read back whole, compared across evaluations."""

from __future__ import annotations

from pathlib import Path

import pytest

from evaluation.findings import ACCURACY, NLL, SystemNote
from evaluation.pairing import compare_scores
from evaluation.questions import Answer, Outcome, Question, Verdict
from evaluation.scores import FILE, Scores
from fusionroute.errors import InvalidRequest

QUESTIONS = [
    Question(f"t/{number}", "t", f"p{number}", cluster=f"c{number // 2}", strata={"half": "ab"[number % 2]})
    for number in range(40)
]


def outcomes(system: str, right: set[int], seed: int = 0, num: int = 40) -> list[Outcome]:
    return [
        Outcome(question, system, seed, Answer("", True), Verdict(float(number in right)))
        for number, question in enumerate(QUESTIONS[:num])
    ]


def made(*names: str, right: dict[str, set[int]], num: dict[str, int] | None = None) -> Scores:
    notes = [SystemNote(name, name.upper(), "served") for name in names]
    found = [each for name in names for each in outcomes(name, right[name], num=(num or {}).get(name, 40))]
    return Scores.of(QUESTIONS, notes, found)


def test_scores_are_read_back_and_the_same_scores_give_the_same_bytes(tmp_path: Path) -> None:
    scores = made("a", "b", right={"a": {1, 2}, "b": {3}}, num={"b": 10})
    scores.write(tmp_path)
    before = (tmp_path / FILE).read_bytes()
    again = Scores.read(tmp_path)
    assert [each.verdict.score for each in again.outcomes_of("a")] == [float(n in {1, 2}) for n in range(40)]
    assert len(list(again.outcomes_of("b"))) == 10, "what was not asked is no zero"
    again.write(tmp_path)
    assert (tmp_path / FILE).read_bytes() == before


def test_two_systems_are_compared_on_what_both_were_asked() -> None:
    scores = made("a", "b", right={"a": set(range(30)), "b": set(range(0, 40, 4))}, num={"b": 20})
    (found,), labels = compare_scores(scores, "a", scores, "b", ["all"])
    assert found.num_questions == 20 and labels["a"] == "A"
    assert found.difference.value == pytest.approx(1.0 - 5 / 20)
    strata = [each.stratum for each in compare_scores(scores, "a", scores, "b")[0]]
    assert strata == ["all", "half=a", "half=b", "task=t"]


def test_the_same_system_of_two_evaluations_is_compared_under_two_names() -> None:
    old, new = made("a", right={"a": {1}}), made("a", right={"a": set(range(20))})
    (found,), labels = compare_scores(new, "a", old, "a", ["all"])
    assert found.difference.value == pytest.approx(19 / 40)
    assert "other evaluation" in labels[found.second]


def read_texts(system: str, better_at: int, num: int = 24) -> list[Outcome]:
    """Texts of 10 tokens, of which every `better_at`th is worth more to this system."""
    return [
        Outcome(
            Question(f"x/{number}", "x", "", facts={"ids": [number]}, cluster=f"x/{number}"),
            system,
            0,
            Answer("", True, 10, -20.0 - number + 5.0 * (number % better_at == 0)),
            Verdict(0.5 + 0.1 * (number % better_at == 0)),
        )
        for number in range(num)
    ]


def test_views_of_texts_are_read_back_and_compared_by_loss_and_by_accuracy(tmp_path: Path) -> None:
    notes = [SystemNote(name, name.upper(), "served") for name in "ab"]
    views = [*read_texts("a", 1), *read_texts("b", 2, num=20)]
    Scores.of(QUESTIONS, notes, outcomes("a", {1}), views).write(tmp_path)
    again = Scores.read(tmp_path)
    assert [each.answer.logprob for each in again.views_of("a")] == [-15.0 - number for number in range(24)]
    assert not list(again.outcomes_of("b")), "it was asked nothing"
    found, _ = compare_scores(again, "a", again, "b", ["task=x"])
    loss, accuracy = found
    assert (loss.measure, accuracy.measure) == (NLL, ACCURACY)
    assert loss.num_questions == 20 and loss.difference.value == pytest.approx(-0.25)
    assert accuracy.difference.value == pytest.approx(0.05)
    strata = [(each.measure, each.stratum) for each in compare_scores(again, "a", again, "a")[0]]
    assert ("nll", "all") in strata and ("score", "half=b") in strata and ("nll", "half=b") not in strata


def test_what_cannot_be_compared_is_said(tmp_path: Path) -> None:
    scores = made("a", "b", right={"a": {1}, "b": {1}})
    with pytest.raises(InvalidRequest, match=r"no system 'c'; known: a, b"):
        compare_scores(scores, "a", scores, "c")
    with pytest.raises(InvalidRequest, match="holds no scores"):
        Scores.read(tmp_path)
    (tmp_path / FILE).write_bytes(b"no gzip")
    with pytest.raises(InvalidRequest, match="holds no scores"):
        Scores.read(tmp_path)
