"""When an answer is right, given the gold one. Pure functions of two texts.

exact    equal but for white space around     "ehaj"                          "ehaj"
number   equal last number                    "so she has 1,250.00 dollars"   "#### 1250"
choice   equal last choice letter             "The answer is (C)."            "C"
"""

from __future__ import annotations

from collections.abc import Callable

from fusionroute.answer_forms import last_choice, last_number

Verifier = Callable[[str, str], bool]
"""(answer, gold) -> whether the answer is right."""


def same_text(answer: str, gold: str) -> bool:
    """Equal but for white space around."""
    return answer.strip() == gold.strip()


def same_number(answer: str, gold: str) -> bool:
    """Equal last numbers; False where one of them has none. Fractions, thousands' commas and signs count."""
    found = last_number(answer)
    return found is not None and found == last_number(gold)


def same_choice(answer: str, gold: str) -> bool:
    """Equal last choice letters; False where one of them has none."""
    found = last_choice(answer)
    return found is not None and found == last_choice(gold)


VERIFIERS: dict[str, Verifier] = {"exact": same_text, "number": same_number, "choice": same_choice}
"""By the name that `PairsJob.verifier` has."""
