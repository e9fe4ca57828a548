"""IFEval (arXiv 2311.07911): prompts with instructions that a program can check."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from evaluation.questions import Question
from evaluation.tasks.json_lines import Row, read_rows
from evaluation.verifiers.instructions.judging import instructions_of
from evaluation.verifiers.instructions.language import check_installed
from evaluation.verifiers.instructions.registry import NEED_LANGUAGES
from fusionroute.errors import InvalidRequest, invalid

TASK = "ifeval"
MAX_TOKENS = 1280
"""Of an answer; some prompts ask for 1200 words, most for far fewer."""


def ifeval_questions(path: Path, *, max_tokens: int = MAX_TOKENS) -> Iterator[Question]:
    """The questions of a file in the benchmark's own format, to be judged by `judging.verify`.

    A row has ``key``, ``prompt``, ``instruction_id_list`` and, of the same length, ``kwargs``; kwargs that are null
    count as absent, other fields of the row are passed over. The prompt is asked as a message of a user.

    Raises:
        InvalidRequest: INVALID_FIELD, no such file, or langdetect is needed and not installed; DATA_INVALID naming
            file, line, field (of an instruction: its name and argument), value and limit.
    """
    seen: dict[str, int] = {}
    for row in read_rows(path):
        question = _question(row, max_tokens)
        if question.id in seen:
            raise row.fault(invalid("key", row.content["key"], f"line {seen[question.id]} has it already"))
        seen[question.id] = row.line
        yield question


def _question(row: Row, max_tokens: int) -> Question:
    key = row.content.get("key")
    if isinstance(key, bool) or not isinstance(key, int | str) or key == "":
        raise row.fault(invalid("key", key, "a whole number, or a text that is not empty"))
    instructions = _instructions(row)
    question = Question(
        id=f"{TASK}/{key}",
        task=TASK,
        prompt=({"role": "user", "content": row.text("prompt")},),
        facts={"instructions": instructions},
        cluster=f"{TASK}/{key}",
        strata={"instructions": str(len(instructions))},
        max_tokens=max_tokens,
    )
    try:
        instructions_of(question)
    except InvalidRequest as error:
        raise row.fault(error) from None
    if any(instruction["name"] in NEED_LANGUAGES for instruction in instructions):
        check_installed()
    return question


def _instructions(row: Row) -> list[dict[str, Any]]:
    names, arguments = row.content.get("instruction_id_list"), row.content.get("kwargs")
    if not isinstance(names, list) or not names:
        raise row.fault(invalid("instruction_id_list", names, "a list of at least one name"))
    if not isinstance(arguments, list) or len(arguments) != len(names):
        raise row.fault(
            invalid("kwargs", arguments, f"a list of {len(names)} objects, one for each instruction")
        )
    for index, given in enumerate(arguments):
        if not isinstance(given, dict):
            raise row.fault(invalid(f"kwargs[{index}]", given, "an object"))
    return [
        {"name": name, "arguments": {key: value for key, value in given.items() if value is not None}}
        for name, given in zip(names, arguments, strict=True)
    ]
