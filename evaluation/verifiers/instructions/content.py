"""Instructions about things that an answer must hold: placeholders, a postscript."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import ClassVar

from evaluation.verifiers.instructions.arguments import Count, Text


@dataclass(frozen=True, slots=True)
class NumberOfPlaceholders:
    """At least so many placeholders in square brackets, ``[address]``, each on one line."""

    name: ClassVar[str] = "detectable_content:number_placeholders"
    num_placeholders: Count

    def is_followed(self, text: str) -> bool:
        """Whether there are enough."""
        return sum(map(_brackets, text.split("\n"))) >= self.num_placeholders


@dataclass(frozen=True, slots=True)
class Postscript:
    """A postscript, which begins with its marker, for example ``P.S.`` or ``P.P.S``.

    Upper and lower case are the same, and a space may follow each full stop: ``p. s.``.
    """

    name: ClassVar[str] = "detectable_content:postscript"
    postscript_marker: Text

    def is_followed(self, text: str) -> bool:
        """Whether the marker occurs."""
        pieces = re.split(r"(?<=\.)\s*", self.postscript_marker)
        spaced = r"[^\S\n]?".join(re.escape(piece) for piece in pieces if piece)
        return re.search(spaced, text, re.IGNORECASE) is not None


def _brackets(line: str) -> int:
    """How many pairs "[...]" follow each other. By hand: a regular expression is slow on thousands of "["."""
    count = 0
    end = -1
    while (start := line.find("[", end + 1)) >= 0 and (end := line.find("]", start)) >= 0:
        count += 1
    return count
