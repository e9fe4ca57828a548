"""The whole of IFEval, from the folder that FUSIONROUTE_DATA_DIR names: built answers are right, others are not."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from evaluation.questions import Answer
from evaluation.tasks.ifeval import ifeval_questions
from evaluation.verifiers.instructions.accuracy import accuracy
from evaluation.verifiers.instructions.judging import Strictness, instructions_of, verify
from tests.instruction_answers import SPOILERS, Wanted, follow

pytestmark = pytest.mark.data

CONTRADICTIONS = {
    # These prompts are to be repeated word for word and hold what the answer must not hold.
    "ifeval/1627": "punctuation:no_comma",
    "ifeval/3369": "keywords:frequency",
    "ifeval/3371": "keywords:forbidden_words",
    "ifeval/3718": "punctuation:no_comma",
    "ifeval/374": "keywords:forbidden_words",
}
FOLLOWED_BY_SILENCE = {"keywords:forbidden_words", "punctuation:no_comma"}
"""With "less than", what many an answer to another question follows, too."""


@pytest.fixture(scope="module")
def folder():
    named = os.environ.get("FUSIONROUTE_DATA_DIR")
    if not named:
        pytest.skip("FUSIONROUTE_DATA_DIR names no folder of benchmarks")
    return Path(named) / "ifeval"


@pytest.fixture(scope="module")
def questions(folder):
    return list(ifeval_questions(folder / "input_data.jsonl.gz"))


@pytest.fixture(scope="module")
def answers(questions):
    return [Answer(follow(question), is_complete=True) for question in questions]


def test_the_benchmark_has_541_prompts_with_834_instructions_of_25_kinds(questions):
    names = [name for question in questions for name, _ in Wanted(question).all]
    assert (len(questions), len(names), len(set(names))) == (541, 834, 25)


def test_the_subset_has_305_of_them_with_one_instruction_each(folder, questions):
    subset = list(ifeval_questions(folder / "single_instruction_subset.jsonl.gz"))
    assert len(subset) == 305
    assert {question.id for question in subset} <= {question.id for question in questions}
    assert {question.strata["instructions"] for question in subset} == {"1"}


def test_answers_built_to_follow_all_instructions_are_right_unless_these_contradict_each_other(
    questions, answers
):
    missed = {
        question.id: verdict.note.split(" ")[0]
        for question, answer in zip(questions, answers, strict=True)
        if not (verdict := verify(question, answer)).is_right
    }
    assert missed == CONTRADICTIONS
    strict = accuracy(zip(questions, answers, strict=True), Strictness.STRICT)
    assert strict.prompts.value == 536 / 541
    assert strict.instructions.value == pytest.approx(829 / 834)


def test_loosely_all_of_them_are_right_because_the_repeated_prompt_may_be_left_out(questions, answers):
    loose = accuracy(zip(questions, answers, strict=True), Strictness.LOOSE)
    assert loose.prompts.value == loose.instructions.value == 1.0


def test_each_instruction_alone_can_be_spoiled(questions, answers):
    left = [
        (question.id, name)
        for question, answer in zip(questions, answers, strict=True)
        for (name, given), instruction in zip(Wanted(question).all, instructions_of(question), strict=True)
        if (text := SPOILERS[name](answer.text, given)).strip() and instruction.is_followed(text)
    ]
    assert left == []


@pytest.mark.parametrize("shift", [1, 100, 270])
def test_answers_to_questions_of_other_kinds_are_nearly_never_right(questions, answers, shift):
    tried = right = 0
    for index, question in enumerate(questions):
        other = (index + shift) % len(questions)
        kinds = _demands(question)
        if kinds and not kinds & {name for name, _ in Wanted(questions[other]).all}:
            tried += 1
            right += verify(question, answers[other]).is_right
    assert tried > 300
    assert right <= 0.02 * tried


def _demands(question):
    """The kinds that ask for something to be there."""
    return {
        name
        for name, given in Wanted(question).all
        if name not in FOLLOWED_BY_SILENCE and "less than" not in given.values()
    }
