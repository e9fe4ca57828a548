"""MATH-500 (from arXiv 2103.03874): competition problems, their answers compared as values."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from evaluation.questions import Question
from evaluation.tasks.json_lines import Row, read_rows
from evaluation.verifiers.numbers import GoldKind, kind_of
from fusionroute.errors import invalid

TASK = "math500"
STOPS = ("\nProblem:", "\n\nProblem")
_INSTRUCTION = r"Reason step by step and put the final answer into \boxed{}."


def math500_questions(
    path: Path, *, only: GoldKind | None = None, chat: bool = False, max_tokens: int = 1024
) -> Iterator[Question]:
    """The questions of a file in the benchmark's own format, for the verifier `math`.

    Strata: ``subject``, ``level`` and ``gold``, the kind of the answer: number, constant or other.

    Args:
        path: rows with ``problem``, ``answer``, and where known ``subject`` and ``level``.
        only: those whose answer is of this kind; ``GoldKind.NUMBER`` for the numeric items.
        chat: ask in a message of a user.

    Raises:
        InvalidRequest: INVALID_FIELD, no such file; DATA_INVALID naming file, line, field, value and limit.
    """
    for row in read_rows(path):
        problem, gold = row.text("problem").strip(), row.text("answer").strip()
        kind = kind_of(gold)
        if only is not None and kind is not only:
            continue
        asked = f"{problem}\n\n{_INSTRUCTION}" if chat else f"Problem: {problem}\n{_INSTRUCTION}\nSolution:"
        yield Question(
            id=f"{TASK}/{row.line}",
            task=TASK,
            prompt=({"role": "user", "content": asked},) if chat else asked,
            reference=gold,
            facts={"verifier": "math"},
            cluster=f"{TASK}/{row.line}",
            strata={"gold": kind.value, **_strata(row)},
            max_tokens=max_tokens,
            stop=() if chat else STOPS,
        )


def _strata(row: Row) -> dict[str, str]:
    strata = {}
    for field in ("subject", "level"):
        value = row.content.get(field)
        if isinstance(value, bool) or not isinstance(value, str | int | None):
            raise row.fault(invalid(field, value, "a text or whole number"))
        if value is not None:
            strata[field] = str(value)
    return strata
