"""HumanEval (arXiv 2107.03374): a function is to be completed from its head and docstring, unit tests judge it."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

from evaluation.questions import Question
from evaluation.tasks.json_lines import Row, read_rows
from fusionroute.errors import invalid

TASK = "humaneval"
STOPS = ("\nclass", "\ndef", "\n#", "\nif", "\nprint")
"""Where a completion ends, as the paper has it: what follows is no longer the function."""
_INSTRUCTION = "Complete this Python function. Answer with the whole function in one fenced block.\n\n"


def humaneval_questions(path: Path, *, chat: bool = False, max_tokens: int = 512) -> Iterator[Question]:
    """The questions of a file in the benchmark's own format, for the verifier `code`.

    Args:
        path: rows with ``task_id``, ``prompt``, ``entry_point``, ``canonical_solution`` and ``test``.
        chat: ask in a message of a user for the whole function, instead of giving its head to go on with.

    Raises:
        InvalidRequest: INVALID_FIELD, no such file; DATA_INVALID naming file, line, field, value and limit.
    """
    for row in read_rows(path):
        prompt, entry_point = row.text("prompt"), row.text("entry_point")
        preamble, head = _cut(row, prompt, entry_point)
        yield Question(
            id=f"{TASK}/{row.text('task_id')}",
            task=TASK,
            prompt=({"role": "user", "content": f"{_INSTRUCTION}```python\n{prompt}```"},)
            if chat
            else prompt,
            reference=row.text("canonical_solution"),
            facts={
                "verifier": "code",
                "preamble": preamble,
                "head": head,
                "names": [entry_point],
                # helpers that the prompt defines are the tests' own, not what a program makes of them
                "tests": f"{preamble}\n{row.text('test')}\ncheck({entry_point})\n",
            },
            cluster=f"{TASK}/{row.text('task_id')}",
            max_tokens=max_tokens,
            stop=() if chat else STOPS,
        )


def _cut(row: Row, prompt: str, entry_point: str) -> tuple[str, str]:
    """What stands before the function to complete, and its head."""
    try:
        body = ast.parse(prompt + "\n    pass\n").body
    except SyntaxError as error:
        raise row.fault(
            invalid("prompt", prompt, f"Python that a function's body can follow: {error}")
        ) from None
    for node in body:
        if isinstance(node, ast.FunctionDef) and node.name == entry_point:
            lines = prompt.splitlines(keepends=True)
            first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)]) - 1
            return "".join(lines[:first]), "".join(lines[first:])
    raise row.fault(invalid("entry_point", entry_point, "a function whose head the prompt has"))
