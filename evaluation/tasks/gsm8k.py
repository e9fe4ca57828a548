"""GSM8K (arXiv 2110.14168): grade-school word problems whose answer is one number."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from pathlib import Path

from evaluation.questions import Question
from evaluation.tasks.json_lines import Row, read_rows
from evaluation.verifiers.numbers import final_number
from fusionroute.errors import invalid

TASK = "gsm8k"
STOPS = ("\nQuestion:", "\n\nQuestion")
_CALCULATOR_MARK = re.compile(r"<<[^>]*>>")


def gsm8k_questions(
    path: Path,
    *,
    examples_path: Path | None = None,
    num_examples: int = 0,
    chat: bool = False,
    max_tokens: int = 400,
) -> Iterator[Question]:
    """The questions of a file in the benchmark's own format, for the verifier `number`.

    Args:
        path: rows with ``question`` and ``answer``, whose number stands after ``####``.
        examples_path: such a file, of other questions, whose first rows are shown worked out before each question.
        num_examples: how many of them.
        chat: ask in a message of a user; examples are turns before it.

    Raises:
        InvalidRequest: INVALID_FIELD, no such file; DATA_INVALID naming file, line, field, value and limit.
    """
    if num_examples and examples_path is None:
        raise invalid(
            "examples_path", "", f"a file of other questions: {num_examples} examples shall be shown"
        )
    examples = (
        [
            (row.text("question").strip(), _solution(row))
            for row in itertools.islice(read_rows(examples_path), num_examples)
        ]
        if examples_path
        else []
    )
    if len(examples) < num_examples:
        raise invalid("num_examples", num_examples, f"at most {len(examples)}, the rows of {examples_path}")
    for row in read_rows(path):
        asked = row.text("question").strip()
        yield Question(
            id=f"{TASK}/{row.line}",
            task=TASK,
            prompt=_messages(asked, examples) if chat else _text(asked, examples),
            reference=_solution(row),
            facts={"verifier": "number"},
            cluster=f"{TASK}/{row.line}",
            max_tokens=max_tokens,
            stop=() if chat else STOPS,
        )


def _solution(row: Row) -> str:
    text = _CALCULATOR_MARK.sub("", row.text("answer")).strip()
    if "####" not in text or final_number(text) is None:
        raise row.fault(invalid("answer", text, "a solution that ends in #### and a number"))
    return text


def _text(asked: str, examples: list[tuple[str, str]]) -> str:
    shown = "".join(f"Question: {question}\nAnswer: {solution}\n\n" for question, solution in examples)
    return f"{shown}Question: {asked}\nAnswer:"


def _messages(asked: str, examples: list[tuple[str, str]]) -> tuple[dict[str, str], ...]:
    turns = [
        {"role": role, "content": content}
        for question, solution in examples
        for role, content in (("user", question), ("assistant", solution))
    ]
    instruction = "" if examples else "\n\nReason step by step and end with a line: #### and the number."
    return (*turns, {"role": "user", "content": asked + instruction})
