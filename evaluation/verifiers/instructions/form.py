"""Instructions about the form of an answer: lists, highlights, sections, JSON, a title, a fixed choice."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any, ClassVar

from evaluation.verifiers.instructions.arguments import Count, Text

CONSTRAINED_CHOICES = ("My answer is yes.", "My answer is no.", "My answer is maybe.")
EMPHASIS = re.compile(r"\*\*\*([^*\n]+)\*\*\*|\*\*([^*\n]+)\*\*|\*([^*\n]+)\*")
FENCE_START = re.compile(r"```(?:json)?", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class BulletList:
    """Exactly so many lines that begin with the bullet ``*`` or ``-``.

    ``**bold**`` begins no bullet. Differs: neither does a line of dashes, ``---``.
    """

    name: ClassVar[str] = "detectable_format:number_bullet_lists"
    num_bullets: Count

    def is_followed(self, text: str) -> bool:
        """Whether the number of bullets is right."""
        return sum(map(_is_bullet, text.split("\n"))) == self.num_bullets


@dataclass(frozen=True, slots=True)
class ConstrainedResponse:
    """One of the benchmark's three fixed sentences occurs, letter by letter."""

    name: ClassVar[str] = "detectable_format:constrained_response"

    def is_followed(self, text: str) -> bool:
        """Whether one of them occurs."""
        return any(choice in text for choice in CONSTRAINED_CHOICES)


@dataclass(frozen=True, slots=True)
class HighlightedSections:
    """At least so many ``*highlighted*`` or ``**highlighted**`` parts, each within a line.

    Differs: ``***both***`` is one part, not two.
    """

    name: ClassVar[str] = "detectable_format:number_highlighted_sections"
    num_highlights: Count

    def is_followed(self, text: str) -> bool:
        """Whether there are enough that are not blank."""
        return sum(any(map(str.strip, parts)) for parts in EMPHASIS.findall(text)) >= self.num_highlights


@dataclass(frozen=True, slots=True)
class MultipleSections:
    """At least so many sections, each marked by the splitter and a number: ``SECTION 1``. Case counts."""

    name: ClassVar[str] = "detectable_format:multiple_sections"
    section_spliter: Text  # the data set's spelling
    num_sections: Count

    def is_followed(self, text: str) -> bool:
        """Whether there are enough marks."""
        return len(re.findall(rf"{re.escape(self.section_spliter)}\s?\d+", text)) >= self.num_sections


@dataclass(frozen=True, slots=True)
class JsonFormat:
    """The whole answer is one JSON value; a code fence around it is allowed. Differs: NaN is not JSON."""

    name: ClassVar[str] = "detectable_format:json_format"

    def is_followed(self, text: str) -> bool:
        """Whether it can be read as JSON."""
        try:
            json.loads(without_fence(text), parse_constant=_no_constant, parse_int=str)
        except (ValueError, RecursionError):
            return False
        return True


@dataclass(frozen=True, slots=True)
class Title:
    """A title in double angular brackets, ``<<title>>``, on one line and not empty."""

    name: ClassVar[str] = "detectable_format:title"

    def is_followed(self, text: str) -> bool:
        """Whether there is one."""
        return any(map(_has_title, text.split("\n")))


def without_fence(text: str) -> str:
    """The text inside a code fence of its own (three backticks, perhaps "json" after them), or the text."""
    text = text.strip()
    start = FENCE_START.match(text)
    if start is not None:
        text = text[start.end() :]
    return text.removesuffix("```").strip()


def _is_bullet(line: str) -> bool:
    line = line.strip()
    return line[:1] in ("*", "-") and len(line) > 1 and line[1] != line[0]


def _has_title(line: str) -> bool:
    start, end = line.find("<<"), line.rfind(">>")
    return 0 <= start < end and bool(line[start:end].strip("<> \t"))


def _no_constant(word: str) -> Any:
    raise ValueError(word)
