"""Questions from files: people's own format and those of the benchmarks, on small examples of our own."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from evaluation.questions import RIGHT, Answer, Question
from evaluation.sandbox.box import CheckResult, Sandbox, Status
from evaluation.tasks.gsm8k import gsm8k_questions
from evaluation.tasks.humaneval import humaneval_questions
from evaluation.tasks.jsonl import jsonl_questions
from evaluation.tasks.math500 import math500_questions
from evaluation.tasks.mbpp import Split, mbpp_questions
from evaluation.verifiers.by_name import NAMES, VerifiersByName
from evaluation.verifiers.code import fenced, free_names, program_of, top_level_names
from evaluation.verifiers.numbers import GoldKind
from fusionroute.errors import InvalidRequest

DOUBLE = {
    "task_id": "Own/0",
    "prompt": 'import math\n\ndef half(x):\n    return x / 2\n\ndef double(x):\n    """Twice x."""\n',
    "entry_point": "double",
    "canonical_solution": "    return 2 * x\n",
    "test": "def check(candidate):\n    assert candidate(2) == 4\n    assert half(candidate(3)) == 3\n",
}
ADD = {
    "text": "Add two numbers.",
    "code": "import sys\r\ndef sum(a, b):\r\n  return a + b\r\nclass Pair:\r\n  def __init__(self, a): self.a = a\r\n",
    "task_id": 11,
    "test_setup_code": "two = 2",
    "test_list": [
        "assert sum(1, two) == 3",
        "assert sum(Pair(4).a, 0) == 4",
        "assert sys.maxsize > sum(1, 1)",
    ],
    "challenge_test_list": [],
}


def _file(folder: Path, *rows: Any, name: str = "own.jsonl") -> Path:
    path = folder / name
    text = "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)
    if name.endswith(".gz"):
        path.write_bytes(gzip.compress(text.encode()))
    else:
        path.write_text(text)
    return path


@pytest.fixture(scope="module")
def verifiers() -> VerifiersByName:
    sandbox = Sandbox()
    if missing := sandbox.protection.missing:
        pytest.skip(f"no program is run here: {missing}")
    return VerifiersByName(sandbox)


def test_own_questions_have_what_their_rows_say(tmp_path: Path):
    row = {
        "prompt": [{"role": "user", "content": "2+2?"}],
        "answer": 4,
        "verifier": "number",
        "facts": {"note": "sum"},
        "cluster": "sums",
        "strata": {"size": "small"},
        "id": "first",
        "max_tokens": 9,
        "stop": ["\n"],
    }
    (question,) = jsonl_questions(_file(tmp_path, row, name="own.jsonl.gz"))
    assert question == Question(
        id="own/first",
        task="own",
        prompt=({"role": "user", "content": "2+2?"},),
        reference="4",
        facts={"note": "sum", "verifier": "number"},
        cluster="sums",
        strata={"size": "small"},
        max_tokens=9,
        stop=("\n",),
    )


def test_own_questions_need_little(tmp_path: Path):
    path = _file(tmp_path, {"prompt": "a", "reference": "b"}, "", {"prompt": "a", "answer": "b"})
    first, second = jsonl_questions(path, task="mine", verifier="contains", max_tokens=7, stop=(".",))
    assert (first.id, first.cluster, second.id) == ("mine/1", "mine/1", "mine/3")
    assert (first.facts, first.max_tokens, first.stop) == ({"verifier": "contains"}, 7, (".",))


RIGHT_AND_WRONG: list[tuple[dict[str, Any], str, str]] = [
    ({"verifier": "exact", "answer": "yes"}, " yes\n", "Yes"),
    ({"verifier": "contains", "answer": "the  cat"}, "I saw The cat.", "I saw the dog."),
    ({"verifier": "regex", "answer": r"^\d{3}$"}, "so\n123\nyes", "1234"),
    ({"verifier": "choice", "answer": "B"}, "The answer is (B).", "The answer is (C)."),
    ({"verifier": "number", "answer": 12.5}, "it costs $12.50", "it costs 12"),
    ({"verifier": "math", "answer": r"\frac12"}, r"\boxed{0.5}", r"\boxed{2}"),
    (
        {"verifier": "code", "facts": {"tests": ["assert double(2) == 4", "assert abs(double(-1)) == 2"]}},
        "Sure:\n```python\ndef double(x):\n    return 2 * x\n```\nDone.",
        "```python\ndef double(x):\n    return 4\n```",
    ),
    (
        {"verifier": "code", "facts": {"tests": "assert half(4) == 2", "head": "def half(x):\n"}},
        "    return x / 2\n",
        "    return x\n",
    ),
]


def test_each_verifier_has_an_example():
    assert {row["verifier"] for row, _, _ in RIGHT_AND_WRONG} == set(NAMES)


@pytest.mark.parametrize(("row", "right", "wrong"), RIGHT_AND_WRONG)
def test_verifiers_are_chosen_by_name(
    tmp_path: Path, verifiers: VerifiersByName, row, right: str, wrong: str
):
    (question,) = jsonl_questions(_file(tmp_path, {"prompt": "p", **row}))
    assert verifiers.verify(question, Answer(right, True)) == RIGHT
    verdict = verifiers.verify(question, Answer(wrong, True))
    assert verdict.score == 0
    assert verdict.note
    assert verifiers.verify(question, Answer("", False)).score == 0


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"answer": "b"}, "prompt = None"),
        ({"prompt": " ", "answer": "b"}, "prompt = ' '"),
        ({"prompt": [], "answer": "b"}, "prompt = []"),
        ({"prompt": [{"role": "bot", "content": "x"}], "answer": "b"}, "prompt[0] ="),
        ({"prompt": [{"role": "user", "content": 3}], "answer": "b"}, "prompt[0].content = 3"),
        ({"prompt": "a"}, "answer = None"),
        ({"prompt": "a", "answer": True}, "answer = True"),
        ({"prompt": "a", "answer": "b", "reference": "b"}, "reference = 'b'"),
        (
            {"prompt": "a", "answer": "b", "verifier": "magic"},
            "verifier = 'magic' is not allowed: one of exact",
        ),
        ({"prompt": "a", "answer": "none", "verifier": "number"}, "answer = 'none'"),
        ({"prompt": "a", "answer": "none", "verifier": "choice"}, "answer = 'none'"),
        ({"prompt": "a", "answer": "(", "verifier": "regex"}, "answer = '('"),
        ({"prompt": "a", "verifier": "code"}, "facts.tests = None"),
        ({"prompt": "a", "verifier": "code", "facts": {"tests": "assert ("}}, "facts.tests = 'assert ('"),
        ({"prompt": "a", "verifier": "code", "facts": {"tests": "assert 1"}}, "facts.names = []"),
        (
            {"prompt": "a", "verifier": "code", "facts": {"tests": "f()", "names": ["a b"]}},
            "facts.names = ['a b']",
        ),
        ({"prompt": "a", "verifier": "code", "facts": {"tests": "f()", "head": 1}}, "facts.head = 1"),
        ({"prompt": "a", "answer": "b", "strata": {"x": 1}}, "strata = {'x': 1}"),
        ({"prompt": "a", "answer": "b", "facts": []}, "facts = []"),
        ({"prompt": "a", "answer": "b", "max_tokens": 0}, "max_tokens = 0"),
        ({"prompt": "a", "answer": "b", "stop": "x"}, "stop = 'x'"),
        ({"prompt": "a", "answer": "b", "id": ""}, "id = ''"),
        ({"prompt": "a", "answer": "b", "awnser": "c"}, "field = 'awnser' is not allowed: one of answer"),
        ({"prompt": "a", "answer": "b", "id": "1"}, "another than in line 1"),
    ],
)
def test_a_bad_row_is_named_with_file_line_field_and_value(tmp_path: Path, row: dict[str, Any], said: str):
    path = _file(tmp_path, {"prompt": "good", "answer": "good", "id": "1"}, row)
    with pytest.raises(InvalidRequest) as caught:
        list(jsonl_questions(path))
    assert caught.value.message.startswith(f"{path}: line 2: ")
    assert said in caught.value.message


def test_word_problems_show_worked_examples_without_calculator_marks(tmp_path: Path):
    path = _file(tmp_path, {"question": "How many? ", "answer": "2+2=<<2+2=4>>4\n#### 4"})
    (plain,) = gsm8k_questions(path)
    assert (plain.prompt, plain.reference) == ("Question: How many?\nAnswer:", "2+2=4\n#### 4")
    (shown,) = gsm8k_questions(path, examples_path=path, num_examples=1)
    assert shown.prompt == "Question: How many?\nAnswer: 2+2=4\n#### 4\n\nQuestion: How many?\nAnswer:"
    (chat,) = gsm8k_questions(path, examples_path=path, num_examples=1, chat=True)
    assert not isinstance(chat.prompt, str)
    assert [turn["role"] for turn in chat.prompt] == ["user", "assistant", "user"]
    with pytest.raises(InvalidRequest, match="num_examples = 2"):
        list(gsm8k_questions(path, examples_path=path, num_examples=2))
    with pytest.raises(InvalidRequest, match="line 1: answer ="):
        list(gsm8k_questions(_file(tmp_path, {"question": "q", "answer": "4"})))


def test_competition_problems_are_divided_by_their_gold_answers(tmp_path: Path):
    rows = [
        {"problem": "p", "answer": "4", "subject": "Algebra", "level": 2},
        {"problem": "p", "answer": "x+1", "subject": "Algebra", "level": 3},
    ]
    path = _file(tmp_path, *rows)
    first, second = math500_questions(path)
    assert first.strata == {"gold": "number", "subject": "Algebra", "level": "2"}
    assert second.strata["gold"] == "other"
    assert [question.id for question in math500_questions(path, only=GoldKind.NUMBER)] == [first.id]


def test_a_function_is_completed_or_written_anew(tmp_path: Path, verifiers: VerifiersByName):
    (question,) = humaneval_questions(_file(tmp_path, DOUBLE))
    assert question.prompt == DOUBLE["prompt"]
    right = [
        question.reference,
        "    return x + x\nprint(double('unused'))\ndef check(x): pass",
        "```python\ndef double(x):\n    return math.floor(2 * x)\n```",
        "```\nbad\n```\nbetter:\n```py\ndef double(x): return x * 2\n```\n```sh\nls\n```",
        "def double(x):\n    return x * 2\n",
    ]
    wrong = [
        "    return 4\n",
        "",
        "```python\ndef other(x): return x * 2\n```",
        "    return half(x) * 4\n    half = 3",
    ]
    # what the prompt defines is the tests' own: a program cannot bend it
    wrong.append("```python\ndef half(x): return 3\ndef double(x): return 4\n```")
    assert [verifiers.verify(question, Answer(text, True)).is_right for text in right] == [True] * len(right)
    assert [verifiers.verify(question, Answer(text, True)).is_right for text in wrong] == [False] * len(wrong)
    (chat,) = humaneval_questions(_file(tmp_path, DOUBLE), chat=True)
    assert chat.stop == ()
    assert not isinstance(chat.prompt, str)
    assert chat.prompt[0]["content"].endswith(f"```python\n{DOUBLE['prompt']}```")


def test_a_program_for_a_sentence_and_three_tests(tmp_path: Path, verifiers: VerifiersByName):
    (question,) = mbpp_questions(_file(tmp_path, ADD), num_examples=0)
    assert isinstance(question.prompt, str)
    assert question.prompt.endswith("\n[BEGIN]\n")
    assert question.facts["names"] == ["sum", "Pair"]
    assert verifiers.verify(question, Answer(question.reference, True)) == RIGHT
    assert verifiers.verify(question, Answer(question.reference + "\n[DONE]\nNo Python.", True)) == RIGHT
    assert verifiers.verify(question, Answer("def sum(a, b): return 3", True)).score == 0


def test_examples_and_splits_go_by_the_number_of_the_task(tmp_path: Path):
    rows = [{**ADD, "task_id": number, "text": f"Task {number}."} for number in (2, 3, 4, 11, 510, 511)]
    path = _file(tmp_path, *rows)
    questions = list(mbpp_questions(path))
    assert [question.id for question in questions] == ["mbpp/11", "mbpp/510"]
    assert str(questions[0].prompt).count("[DONE]") == 3
    assert [question.id for question in mbpp_questions(path, split=Split.VALIDATION)] == ["mbpp/511"]
    sanitized = _file(
        tmp_path,
        {k: v for k, v in ADD.items() if k not in ("text", "task_id")} | {"prompt": "Add."},
        name="s.jsonl",
    )
    (question,) = mbpp_questions(sanitized, examples_path=path, num_examples=1)
    assert str(question.prompt).count("[DONE]") == 1
    with pytest.raises(InvalidRequest, match=r"tasks \[2, 3, 4\]"):
        list(mbpp_questions(sanitized))


def test_programs_are_found_in_answers():
    assert fenced("no fence", ["f"]) is None
    assert (
        fenced("```python\ndef g(): pass\n```\n```\ndef f(): pass\n```\n```\nf()\n```", ["f"])
        == "def f(): pass\n"
    )
    assert fenced("~~~\nx = 1", ["f"]) == "x = 1"
    assert fenced("```bash\nls\n```", ["f"]) is None
    question = Question(
        "t/1", "t", "p", facts={"names": ["f"], "tests": "", "preamble": "import os", "head": ""}
    )
    assert program_of(question, "x = 1") == "import os\nx = 1"


def test_names_that_tests_take_from_programs():
    check = "def check(g):\n    for i in range(3): assert m.pi < g(i) + h.x + sum([k for k in q])\n"
    tests = f"import math as m\n{check}check(f)\n"
    assert set(free_names(tests)) == {"f", "h", "q"}
    assert top_level_names("import a\ndef f(): pass\nclass C: pass\nx = y = 1\n") == ["f", "C", "x", "y"]


def test_a_program_that_is_too_long_is_not_run():
    class NeverAsked(Sandbox):
        def check(self, program: str, tests: str, names) -> CheckResult:
            return CheckResult(Status.PASSED)

    question = Question("t/1", "t", "p", facts={"verifier": "code", "names": ["f"], "tests": "f()"})
    verdict = VerifiersByName(NeverAsked()).verify(question, Answer("x" * 300_000, True))
    assert verdict.note.startswith("a program of 300000 characters")
