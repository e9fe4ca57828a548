"""`fusionroute eval compare`: what it says of scores on disk, and to people who ask for what is not there."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from evaluation.findings import SystemNote
from evaluation.questions import Answer, Outcome, Question, Verdict
from evaluation.scores import FILE, Scores
from fusionroute.cli import main

QUESTIONS = [
    Question(f"t/{number}", "t", "?", cluster=f"c{number // 2}", strata={"half": "ab"[number % 2]})
    for number in range(60)
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Of `good`, `bad`, and `late`, which was asked with another training seed."""
    right = {"good": range(50), "bad": range(0, 60, 3), "late": range(10)}
    notes = [SystemNote(name, f"the {name} one", "served") for name in right]
    outcomes = [
        Outcome(question, name, 1 if name == "late" else 0, Answer("", True), Verdict(float(number in of)))
        for name, of in right.items()
        for number, question in enumerate(QUESTIONS)
    ]
    Scores.of(QUESTIONS, notes, outcomes).write(tmp_path)
    return tmp_path


def compare(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["eval", "compare", *map(str, arguments)])


def test_it_says_who_is_ahead_everywhere_and_in_every_part(folder: Path):
    result = compare(folder, "good", "bad")
    assert result.exit_code == 0, result.output
    lines = result.output.splitlines()
    assert len(lines) == 4 and lines[0].startswith(
        "the good one is ahead of the bad one on all questions: +0.500 ["
    )
    assert [line.split(": ")[0].rpartition(" ")[2] for line in lines[1:]] == ["half=a", "half=b", "task=t"]


def test_asked_the_other_way_round_it_says_the_opposite(folder: Path):
    there, back = (json.loads(compare(folder, *pair, "--stratum", "half=a", "--json").output)[0]
                   for pair in (("good", "bad"), ("bad", "good")))  # fmt: skip
    assert there["difference"]["value"] == -back["difference"]["value"] > 0.3
    assert there["p_adjusted"] == back["p_adjusted"] < 0.05
    assert (there["only_first"], there["only_second"]) == (back["only_second"], back["only_first"])
    assert there["measure"] == "score" and 0.0 < there["mcnemar"] < 0.05


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("good", "none"), "there is no system 'none'; known: bad, good, late"),
        (("good", "late"), "good and late were asked no question alike, of the same training seed"),
        (
            ("good", "bad", "--stratum", "half=c"),
            "stratum = 'half=c' is not allowed: one of all, half=a, half=b, task=t",
        ),
        (("good", "bad", "--stratum", "half"), "stratum = 'half' is not allowed"),
    ],
)
def test_what_is_not_there_is_an_error_in_one_line_not_a_traceback(
    folder: Path, arguments: tuple[str, ...], message: str
):
    result = compare(folder, *arguments)
    assert result.exit_code in (1, 4) and message in result.output
    assert isinstance(result.exception, SystemExit) and "Traceback" not in result.output


def test_a_score_that_is_none_and_a_folder_without_scores_are_named(folder: Path, tmp_path: Path):
    scores = Scores.read(folder)
    odd = Scores(scores.questions, scores.notes, {**scores.scores, "bad": {0: [2.0] * len(QUESTIONS)}})
    odd.write(folder)
    result = compare(folder, "good", "bad")
    assert (
        result.exit_code == 1 and "score = 2.0 of question 't/0' is not allowed: from 0 to 1" in result.output
    )
    (tmp_path / FILE).unlink()
    result = compare(tmp_path, "good", "bad")
    assert result.exit_code == 4 and f"{FILE} holds no scores" in result.output
