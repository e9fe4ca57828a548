"""MBPP (arXiv 2108.07732): short Python programs by a sentence and three tests; full and sanitized format."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from enum import Enum
from pathlib import Path
from typing import Any

from evaluation.questions import Question
from evaluation.tasks.json_lines import Row, read_rows
from evaluation.verifiers.code import free_names, imports_of, top_level_names
from fusionroute.errors import invalid

TASK = "mbpp"
STOPS = ("[DONE]",)
EXAMPLE_IDS = (2, 3, 4)
"""Tasks that the paper shows before the question."""


class Split(Enum):
    """Parts of the full set, by the number of the task; the sanitized format has parts in files of their own."""

    PROMPT = (1, 10)
    TEST = (11, 510)
    VALIDATION = (511, 600)
    TRAIN = (601, 974)
    ALL = (0, 1 << 30)


def mbpp_questions(
    path: Path,
    *,
    split: Split = Split.TEST,
    examples_path: Path | None = None,
    num_examples: int = 3,
    max_tokens: int = 512,
) -> Iterator[Question]:
    """The questions of a file in either of the benchmark's formats, for the verifier `code`.

    Args:
        path: rows with ``text`` or ``prompt``, ``code``, ``task_id``, ``test_list``, and ``test_setup_code`` or
            ``test_imports``.
        split: which tasks of the full format; rows without ``task_id`` are all taken.
        examples_path: file of the full format that has the worked examples, where `path` has not.
        num_examples: how many of tasks 2, 3 and 4 stand before the question.

    Raises:
        InvalidRequest: INVALID_FIELD, no such file, or the examples are not in it; DATA_INVALID naming file, line,
            field, value and limit.
    """
    if not 0 <= num_examples <= len(EXAMPLE_IDS):
        raise invalid("num_examples", num_examples, f"0 to {len(EXAMPLE_IDS)}")
    examples = _examples(examples_path or path, num_examples)
    for row in read_rows(path):
        number = row.content.get("task_id", row.line)
        if not isinstance(number, int):
            raise row.fault(invalid("task_id", number, "a whole number"))
        if "task_id" not in row.content or split.value[0] <= number <= split.value[1]:
            yield _question(row, number, examples, max_tokens)


def _examples(path: Path, num_examples: int) -> str:
    wanted = EXAMPLE_IDS[:num_examples]
    rows = {row.content.get("task_id"): row for row in read_rows(path)} if wanted else {}
    missing = [number for number in wanted if number not in rows]
    if missing:
        raise invalid(
            "examples_path",
            str(path),
            f"a file with tasks {missing}, the examples before each question; or num_examples 0",
        )
    return "".join(_asked(rows[number]) + f"{_code(rows[number])}\n[DONE]\n\n" for number in wanted)


def _question(row: Row, number: int, examples: str, max_tokens: int) -> Question:
    code = _code(row)
    setup = _setup(row)
    tests = "\n".join([setup, *_texts(row, "test_list"), *_texts(row, "challenge_test_list", optional=True)])
    try:
        free = free_names(tests)
        # a reference may be named like one of Python's own functions, and is what the tests mean then
        names = [name for name in top_level_names(code) if name in free or f"{name}(" in tests]
        tests = "\n".join([*imports_of(code, free), tests])
    except SyntaxError as error:
        raise row.fault(invalid("test_list", tests, f"Python: {error}")) from None
    return Question(
        id=f"{TASK}/{number}",
        task=TASK,
        prompt=examples + _asked(row),
        reference=code,
        facts={"verifier": "code", "preamble": "", "head": "", "names": names, "tests": tests},
        cluster=f"{TASK}/{number}",
        max_tokens=max_tokens,
        stop=STOPS,
    )


def _asked(row: Row) -> str:
    text = row.text("text" if "text" in row.content else "prompt")
    tests = "\n".join(_texts(row, "test_list"))
    return (
        f"You are an expert Python programmer, and here is your task: {text} "
        f"Your code should pass these tests:\n\n{tests}\n[BEGIN]\n"
    )


def _code(row: Row) -> str:
    return row.text("code").replace("\r\n", "\n").strip("\n")


def _setup(row: Row) -> str:
    setup = row.content.get("test_setup_code", "")
    if not isinstance(setup, str):
        raise row.fault(invalid("test_setup_code", setup, "a text"))
    return "\n".join([*_texts(row, "test_imports", optional=True), setup.replace("\r\n", "\n")])


def _texts(row: Row, field: str, *, optional: bool = False) -> Sequence[str]:
    value: Any = row.content.get(field, [] if optional else None)
    if (
        not isinstance(value, list)
        or not all(isinstance(text, str) for text in value)
        or not (value or optional)
    ):
        raise row.fault(invalid(field, value, "a list of texts" + ("" if optional else ", at least one")))
    return [text.replace("\r\n", "\n") for text in value]
