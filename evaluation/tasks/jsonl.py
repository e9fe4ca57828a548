"""Questions of people's own: one JSON object a line, judged by a verifier chosen by name."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from evaluation.questions import Message, Question
from evaluation.tasks.json_lines import Row, read_rows
from evaluation.verifiers.by_name import NAMES
from evaluation.verifiers.code import free_names
from evaluation.verifiers.numbers import final_number
from fusionroute.answer_forms import last_choice
from fusionroute.errors import invalid

_ROLES = ("system", "user", "assistant")
_FIELDS = frozenset(
    ("prompt", "answer", "reference", "facts", "cluster", "strata", "id", "verifier", "max_tokens", "stop")
)
MAX_TOKENS_LIMIT = 1 << 20


def jsonl_questions(
    path: Path,
    *,
    task: str = "",
    verifier: str = "exact",
    max_tokens: int = 256,
    stop: tuple[str, ...] = (),
) -> Iterator[Question]:
    """The questions of a file in the format of docs/tasks.md.

    Args:
        path: the file.
        task: name of the task, the file's without suffix where "".
        verifier, max_tokens, stop: of rows that have none of their own.

    Raises:
        InvalidRequest: INVALID_FIELD, no such file or verifier; DATA_INVALID naming file, line, field, value and
            limit, also for two rows with one id and fields that are not known.
    """
    if verifier not in NAMES:
        raise invalid("verifier", verifier, f"one of {', '.join(NAMES)}")
    task = task or path.name.partition(".jsonl")[0]
    lines: dict[str, int] = {}
    for row in read_rows(path):
        question = _question(row, task, verifier, max_tokens, stop)
        if question.id in lines:
            raise row.fault(
                invalid("id", row.content.get("id"), f"another than in line {lines[question.id]}")
            )
        lines[question.id] = row.line
        yield question


def _question(row: Row, task: str, verifier: str, max_tokens: int, stop: tuple[str, ...]) -> Question:
    if unknown := sorted(set(row.content) - _FIELDS):
        raise row.fault(invalid("field", unknown[0], f"one of {', '.join(sorted(_FIELDS))}"))
    verifier = _text(row, "verifier", verifier)
    if verifier not in NAMES:
        raise row.fault(invalid("verifier", verifier, f"one of {', '.join(NAMES)}"))
    name = _text(row, "id", str(row.line))
    reference = _reference(row, verifier)
    return Question(
        id=f"{task}/{name}",
        task=task,
        prompt=_prompt(row),
        reference=reference,
        facts=_facts(row, verifier),
        cluster=_text(row, "cluster", f"{task}/{name}"),
        strata=_strata(row),
        max_tokens=_max_tokens(row, max_tokens),
        stop=_stop(row, stop),
    )


def _prompt(row: Row) -> str | tuple[Message, ...]:
    prompt = row.content.get("prompt")
    if isinstance(prompt, str):
        return row.text("prompt")
    if not isinstance(prompt, list) or not prompt:
        raise row.fault(invalid("prompt", prompt, "a text that is not empty, or a list of messages"))
    for place, message in enumerate(prompt):
        if (
            not isinstance(message, dict)
            or set(message) != {"role", "content"}
            or message["role"] not in _ROLES
        ):
            limit = f'{{"role": one of {", ".join(_ROLES)}, "content": text}}'
            raise row.fault(invalid(f"prompt[{place}]", message, limit))
        if not isinstance(message["content"], str):
            raise row.fault(invalid(f"prompt[{place}].content", message["content"], "a text"))
    return tuple(prompt)


def _reference(row: Row, verifier: str) -> str:
    if "answer" in row.content and "reference" in row.content:
        raise row.fault(
            invalid("reference", row.content["reference"], "absent where there is an answer: they are one")
        )
    field = "reference" if "reference" in row.content else "answer"
    value = row.content.get(field)
    if isinstance(value, int | float) and not isinstance(value, bool):
        value = str(value)
    if value is None and verifier == "code":
        return ""
    if not isinstance(value, str) or not value.strip():
        raise row.fault(invalid(field, value, f"a text or number, which verifier {verifier} compares with"))
    _check_reference(row, field, value, verifier)
    return value


def _check_reference(row: Row, field: str, value: str, verifier: str) -> None:
    """One that no answer could ever equal is a mistake in the file."""
    if verifier == "number" and final_number(value) is None:
        raise row.fault(invalid(field, value, "a text with a number, for verifier number"))
    if verifier == "choice" and last_choice(value) is None:
        raise row.fault(invalid(field, value, "a text with a capital letter, for verifier choice"))
    if verifier == "regex":
        try:
            re.compile(value)
        except re.error as error:
            raise row.fault(invalid(field, value, f"a regular expression: {error}")) from None


def _facts(row: Row, verifier: str) -> Mapping[str, Any]:
    facts = row.content.get("facts", {})
    if not isinstance(facts, dict):
        raise row.fault(invalid("facts", facts, "an object"))
    facts = {**facts, "verifier": verifier}
    if verifier != "code":
        return facts
    tests = facts.get("tests")
    if isinstance(tests, list) and all(isinstance(test, str) for test in tests):
        tests = "\n".join(tests)
    if not isinstance(tests, str) or not tests.strip():
        raise row.fault(
            invalid("facts.tests", tests, "Python that raises where a program is wrong, for verifier code")
        )
    for field in ("preamble", "head"):
        if not isinstance(facts.get(field, ""), str):
            raise row.fault(invalid(f"facts.{field}", facts[field], "a text"))
    return {**facts, "tests": tests, "names": _names(row, facts.get("names"), tests)}


def _names(row: Row, names: object, tests: str) -> list[str]:
    if names is None:
        try:
            names = free_names(tests)
        except SyntaxError as error:
            raise row.fault(invalid("facts.tests", tests, f"Python: {error}")) from None
    if (
        not isinstance(names, list)
        or not names
        or not all(isinstance(n, str) and n.isidentifier() for n in names)
    ):
        raise row.fault(
            invalid("facts.names", names, "names that the tests take from a program, at least one")
        )
    return names


def _strata(row: Row) -> Mapping[str, str]:
    strata = row.content.get("strata", {})
    if not isinstance(strata, dict) or not all(isinstance(part, str) for part in strata.values()):
        raise row.fault(invalid("strata", strata, "an object of texts: division -> part"))
    return strata


def _text(row: Row, field: str, default: str) -> str:
    value = row.content.get(field, default)
    if isinstance(value, int) and not isinstance(value, bool):
        value = str(value)
    if not isinstance(value, str) or not value.strip():
        raise row.fault(invalid(field, value, "a text that is not empty"))
    return value


def _max_tokens(row: Row, default: int) -> int:
    value = row.content.get("max_tokens", default)
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= MAX_TOKENS_LIMIT:
        raise row.fault(invalid("max_tokens", value, f"1 to {MAX_TOKENS_LIMIT}"))
    return value


def _stop(row: Row, default: tuple[str, ...]) -> tuple[str, ...]:
    value = row.content.get("stop", list(default))
    if not isinstance(value, list) or not all(isinstance(text, str) and text for text in value):
        raise row.fault(invalid("stop", value, "a list of texts that are not empty"))
    return tuple(value)
