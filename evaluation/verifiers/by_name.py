"""The verifiers by the name that a question has among its facts."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from evaluation.questions import Answer, Question, Verdict
from evaluation.sandbox.box import Sandbox
from evaluation.verifiers.code import CodeVerifier
from evaluation.verifiers.numbers import verify_math, verify_number
from evaluation.verifiers.text import verify_choice, verify_contains, verify_exact, verify_regex
from fusionroute.errors import invalid

Verifier = Callable[[Question, Answer], Verdict]

QUICK: Mapping[str, Verifier] = {
    "exact": verify_exact,
    "contains": verify_contains,
    "regex": verify_regex,
    "choice": verify_choice,
    "number": verify_number,
    "math": verify_math,
}
"""Those that only look at text."""
NAMES = (*QUICK, "code")


class VerifiersByName:
    """Judges a question by the verifier that ``facts["verifier"]`` names; ``code`` takes a process tree each.

    Args:
        sandbox: where programs run, if there are any; the default one otherwise.
    """

    def __init__(self, sandbox: Sandbox | None = None) -> None:
        self._verifiers = {**QUICK, "code": CodeVerifier(sandbox or Sandbox()).verify}

    def verify(self, question: Question, answer: Answer) -> Verdict:
        """Judge.

        Raises:
            InvalidRequest: INVALID_FIELD, there is no verifier of that name.
            Unavailable: a program was to run and the sandbox cannot be made safe here.
        """
        name = str(question.facts.get("verifier", ""))
        if name not in self._verifiers:
            raise invalid("facts.verifier", name, f"one of {', '.join(NAMES)}")
        return self._verifiers[name](question, answer)
