"""What a suite's file says of a task reaches its questions and the sandbox."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from evaluation.questions import Answer
from evaluation.suites.config import Suite
from evaluation.suites.loading import LoadedTask, loaded_tasks
from fusionroute.lab.tasks import TASKS

MBPP = [
    {"task_id": number, "text": f"Task {number}.", "code": f"def f{number}(): return {number}",
     "test_list": [f"assert f{number}() == {number}"], "test_setup_code": ""}
    for number in (2, 20, 520, 700)
]  # fmt: skip
MATH = [{"problem": "Half of 14?", "answer": "7"}, {"problem": "Area?", "answer": "2\\pi"}]
HUNGRY = [{"id": "a", "prompt": "?", "verifier": "code", "facts": {"tests": ["assert big() > 0"]}}]


def loaded(folder: Path, rows: list[dict[str, object]], lines: str) -> LoadedTask:
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "suite.toml").write_text(f'name = "s"\n[[tasks]]\nfile = "rows.jsonl"\n{lines}')
    (task,) = loaded_tasks(Suite.from_toml(folder / "suite.toml"))
    return task


@pytest.mark.parametrize(
    ("split", "numbers"), [("", [20]), ("train", [700]), ("validation", [520]), ("all", [2, 20, 520, 700])]
)
def test_mbpp_is_cut_as_the_suite_says(tmp_path: Path, split: str, numbers: list[int]) -> None:
    task = loaded(tmp_path, MBPP, f'kind = "mbpp"\nnum_examples = 0\nsplit = "{split}"')
    assert [question.id for question in task.questions] == [f"mbpp/mbpp/{number}" for number in numbers]


@pytest.mark.parametrize(
    ("gold", "references"), [("", ["7", "2\\pi"]), ("number", ["7"]), ("constant", ["2\\pi"])]
)
def test_math500_asks_only_for_the_wanted_kind_of_answer(
    tmp_path: Path, gold: str, references: list[str]
) -> None:
    task = loaded(tmp_path, MATH, f'kind = "math500"\ngold = "{gold}"')
    assert [question.reference for question in task.questions] == references


@pytest.mark.parametrize(("limit", "passes"), [("memory_mib = 64", False), ("memory_mib = 600", True)])
def test_programs_have_the_memory_that_the_suite_gives_them(tmp_path: Path, limit: str, passes: bool) -> None:
    task = loaded(tmp_path, HUNGRY, f'kind = "jsonl"\n{limit}')
    program = "```python\ndef big():\n    return len(bytearray(200 << 20))\n```"
    assert task.verify(task.questions[0], Answer(program, True)).is_right is passes


def test_programs_have_the_time_that_the_suite_gives_them(tmp_path: Path) -> None:
    task = loaded(tmp_path, HUNGRY, 'kind = "jsonl"\ncpu_seconds = 1')
    verdict = task.verify(task.questions[0], Answer("```python\ndef big():\n    while True: pass\n```", True))
    assert not verdict.is_right and "1 s" in verdict.note


@pytest.mark.parametrize(("limit", "count"), [("", 460), ("max_questions = 46", 46), ("max_questions = 500", 500)])
def test_the_first_so_many_of_the_labs_questions_are_of_all_its_tasks(
    tmp_path: Path, limit: str, count: int
) -> None:
    (tmp_path / "suite.toml").write_text(f'name = "s"\n[[tasks]]\nkind = "lab"\n{limit}')
    (task,) = loaded_tasks(Suite.from_toml(tmp_path / "suite.toml"))
    assert len(task.questions) == count
    of_tasks = Counter(question.id.split("/")[1] for question in task.questions)
    assert len(of_tasks) == len(TASKS) and max(of_tasks.values()) - min(of_tasks.values()) <= 1
