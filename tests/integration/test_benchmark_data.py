"""The benchmarks' own references are right and shuffled ones are not, over FUSIONROUTE_DATA_DIR."""

from __future__ import annotations

import ast
import gzip
import json
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from evaluation.questions import Answer, Question
from evaluation.tasks.gsm8k import gsm8k_questions
from evaluation.tasks.humaneval import humaneval_questions
from evaluation.tasks.math500 import math500_questions
from evaluation.tasks.mbpp import Split, mbpp_questions
from evaluation.verifiers.by_name import VerifiersByName
from evaluation.verifiers.numbers import verify_number

pytestmark = [pytest.mark.data, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def folder() -> Path:
    named = os.environ.get("FUSIONROUTE_DATA_DIR")
    if not named:
        pytest.skip("FUSIONROUTE_DATA_DIR names no folder of benchmarks")
    return Path(named)


@pytest.fixture(scope="module")
def verifiers() -> VerifiersByName:
    return VerifiersByName()


def _right(verifiers: VerifiersByName, pairs: Iterable[tuple[Question, str]]) -> list[str]:
    """Ids of the questions to which the text is right."""
    pairs = list(pairs)
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        verdicts = list(threads.map(lambda pair: verifiers.verify(pair[0], Answer(pair[1], True)), pairs))
    return [pair[0].id for pair, verdict in zip(pairs, verdicts, strict=True) if verdict.is_right]


def _shuffled(questions: list[Question]) -> list[tuple[Question, str]]:
    """Each question with the reference of the next one."""
    return [
        (one, other.reference) for one, other in zip(questions, questions[1:] + questions[:1], strict=True)
    ]


def _judged(verifiers: VerifiersByName, questions: list[Question]) -> tuple[int, int]:
    """How many are right with their own references, and with those of others."""
    own = _right(verifiers, [(question, question.reference) for question in questions])
    return len(own), len(_right(verifiers, _shuffled(questions)))


def test_gsm8k(folder: Path, verifiers: VerifiersByName):
    questions = list(gsm8k_questions(folder / "gsm8k/test.jsonl.gz"))
    own, shuffled = _judged(verifiers, questions)
    assert (len(questions), own) == (1319, 1319)
    assert shuffled <= 20  # small numbers are often the same ones


def test_gsm8k_agrees_with_the_flags_of_published_solutions(folder: Path):
    disagreeing = []
    with gzip.open(folder / "gsm8k/test_model_solutions.jsonl.gz", "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    for row in rows:
        question = Question("g/1", "g", "p", reference=row["ground_truth"])
        for name, value in row.items():
            if name not in ("question", "ground_truth"):
                solution = ast.literal_eval(value) if isinstance(value, str) else value
                verdict = verify_number(question, Answer(solution["solution"] or "", True))
                if verdict.is_right != solution["is_correct"]:
                    disagreeing.append((name, row["question"], verdict))
    assert not disagreeing


def test_math500(folder: Path, verifiers: VerifiersByName):
    questions = list(math500_questions(folder / "math500/test.jsonl.gz"))
    own, shuffled = _judged(verifiers, questions)
    assert (len(questions), own) == (500, 500)
    assert shuffled <= 10
    with gzip.open(folder / "math500/test.jsonl.gz", "rt", encoding="utf-8") as lines:
        solutions = [json.loads(line)["solution"] for line in lines]
    assert len(_right(verifiers, zip(questions, solutions, strict=True))) == 500
    kinds = [question.strata["gold"] for question in questions]
    assert (kinds.count("number"), kinds.count("constant"), kinds.count("other")) == (401, 28, 71)


def test_humaneval(folder: Path, verifiers: VerifiersByName):
    questions = list(humaneval_questions(folder / "humaneval/HumanEval.jsonl.gz"))
    own, shuffled = _judged(verifiers, questions)
    assert (len(questions), own, shuffled) == (164, 164, 0)
    whole = [
        (question, f"Here it is.\n```python\n{question.prompt}{question.reference}```\nIt works.")
        for question in humaneval_questions(folder / "humaneval/HumanEval.jsonl.gz")
    ]
    assert len(_right(verifiers, whole)) == 164


def test_mbpp(folder: Path, verifiers: VerifiersByName):
    questions = list(mbpp_questions(folder / "mbpp/mbpp.jsonl.gz", split=Split.ALL))
    own, shuffled = _judged(verifiers, questions)
    assert (len(questions), own) == (974, 974)
    assert shuffled <= 5  # neighbours may define the same function


def test_mbpp_sanitized(folder: Path, verifiers: VerifiersByName):
    path = folder / "mbpp/mbpp_sanitized_test.jsonl.gz"
    questions = list(mbpp_questions(path, examples_path=folder / "mbpp/mbpp.jsonl.gz"))
    own, shuffled = _judged(verifiers, questions)
    assert (len(questions), own) == (257, 257)
    assert shuffled <= 2
