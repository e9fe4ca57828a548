"""Answers that are Python: found in the text, put together with what the task gives, and run in the sandbox."""

from __future__ import annotations

import ast
import builtins
import re
import warnings
from collections.abc import Iterable

from evaluation.questions import RIGHT, Answer, Question, Verdict
from evaluation.sandbox.box import Sandbox

MAX_PROGRAM_CHARACTERS = 200_000
_FENCE = re.compile(
    r"^[ \t]*(?:```|~~~)[ \t]*([\w+.#-]*)[^\n]*\n(.*?)(?:^[ \t]*(?:```|~~~)|\Z)", re.DOTALL | re.MULTILINE
)
_PYTHON_NAMES = frozenset({"", "py", "python", "python3", "py3"})


class CodeVerifier:
    """Right is what passes the task's tests; slow: one process tree for each answer.

    Facts of a question:
        tests: Python that raises where the answer is wrong.
        names: what the tests take from the answer's program.
        preamble: what stands before the answer, such as imports; "" without.
        head: beginning of the function that an answer without a fence goes on with; "" where it is a program.

    Args:
        sandbox: where programs run.
    """

    def __init__(self, sandbox: Sandbox) -> None:
        self._sandbox = sandbox

    def verify(self, question: Question, answer: Answer) -> Verdict:
        """Run the tests on the answer.

        Raises:
            Unavailable: the sandbox cannot be made safe here.
        """
        facts = question.facts
        program = program_of(question, answer.text)
        if len(program) > MAX_PROGRAM_CHARACTERS:
            return Verdict(
                0.0, f"a program of {len(program)} characters; at most {MAX_PROGRAM_CHARACTERS} are run"
            )
        result = self._sandbox.check(program, str(facts["tests"]), list(facts["names"]))
        return RIGHT if result.is_passed else Verdict(0.0, result.note)


def program_of(question: Question, text: str) -> str:
    """The program that an answer stands for.

    A fenced block that defines what the tests need is the program; without one, and where the task gives the head of
    a function, an answer that defines the function anew is the program, any other goes on after the head.
    """
    facts = question.facts
    preamble, head = str(facts.get("preamble", "")), str(facts.get("head", ""))
    names = [str(name) for name in facts["names"]]
    block = fenced(text, names)
    body = _before_stops(text, question.stop) if block is None else block
    if head and not _defines(body, names[:1]):
        return preamble + head + body
    return f"{preamble}\n{body}" if preamble else body


def fenced(text: str, names: Iterable[str]) -> str | None:
    """The last block of Python between fences that defines one of `names`, else the last one; None without."""
    blocks = [match[2] for match in _FENCE.finditer(text) if match[1].lower() in _PYTHON_NAMES]
    defining = [block for block in blocks if _defines(block, names)]
    return next(reversed(defining or blocks), None)


def free_names(tests: str) -> list[str]:
    """Names that tests use and neither define nor find among Python's own: what a program has to define.

    Raises:
        SyntaxError: the tests are no Python.
    """
    used: dict[str, None] = {}
    defined = set(dir(builtins))
    for node in ast.walk(_parsed(tests)):
        if isinstance(node, ast.Name):
            if isinstance(node.ctx, ast.Load):
                used[node.id] = None
            else:
                defined.add(node.id)
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            defined.add(node.name)
        elif isinstance(node, ast.arg):
            defined.add(node.arg)
        elif isinstance(node, ast.alias):
            defined.add((node.asname or node.name).partition(".")[0])
        elif isinstance(node, ast.ExceptHandler) and node.name:
            defined.add(node.name)
    return [name for name in used if name not in defined]


def top_level_names(program: str) -> list[str]:
    """Functions and classes that a program defines, and names that it sets.

    Raises:
        SyntaxError: it is no Python.
    """
    names: dict[str, None] = {}
    for node in _parsed(program).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names[node.name] = None
        elif isinstance(node, ast.Assign):
            names.update({target.id: None for target in node.targets if isinstance(target, ast.Name)})
    return list(names)


def imports_of(program: str, names: Iterable[str]) -> list[str]:
    """A program's import statements that bring one of `names`, which tests may have left to it.

    Raises:
        SyntaxError: it is no Python.
    """
    wanted = set(names)
    return [
        ast.unparse(node)
        for node in _parsed(program).body
        if isinstance(node, ast.Import | ast.ImportFrom)
        and any((alias.asname or alias.name).partition(".")[0] in wanted for alias in node.names)
    ]


def _parsed(program: str) -> ast.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of strange escapes in other people's code
        return ast.parse(program)


def _defines(program: str, names: Iterable[str]) -> bool:
    pattern = "|".join(re.escape(name) for name in names)
    return (
        bool(pattern)
        and re.search(rf"^(?:async )?(?:def|class)\s+(?:{pattern})\b", program, re.MULTILINE) is not None
    )


def _before_stops(text: str, stops: Iterable[str]) -> str:
    places = [place for stop in stops if (place := text.find(stop)) >= 0]
    return text[: min(places)] if places else text
