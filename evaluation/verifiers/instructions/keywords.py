"""Instructions about the words and letters of an answer. Upper and lower case are the same here."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import ClassVar

from evaluation.verifiers.instructions.arguments import Character, Comparison, Count, Text, Texts


@dataclass(frozen=True, slots=True)
class Existence:
    """Every keyword occurs, inside a longer word too. Differs: keywords are texts, not regular expressions."""

    name: ClassVar[str] = "keywords:existence"
    keywords: Texts

    def is_followed(self, text: str) -> bool:
        """Whether all occur."""
        return all(_occurrences(keyword, text) for keyword in self.keywords)


@dataclass(frozen=True, slots=True)
class Frequency:
    """The keyword occurs at least, or less than, so many times, inside longer words too. Differs as above."""

    name: ClassVar[str] = "keywords:frequency"
    keyword: Text
    frequency: Count
    relation: Comparison

    def is_followed(self, text: str) -> bool:
        """Whether the number of occurrences that do not overlap is allowed."""
        return self.relation.holds(_occurrences(self.keyword, text), self.frequency)


@dataclass(frozen=True, slots=True)
class ForbiddenWords:
    """None of the words occurs as a word of its own; "rock" does not forbid "rocket"."""

    name: ClassVar[str] = "keywords:forbidden_words"
    forbidden_words: Texts

    def is_followed(self, text: str) -> bool:
        """Whether none occurs."""
        return not any(
            re.search(rf"(?<!\w){re.escape(word)}(?!\w)", text, re.IGNORECASE)
            for word in self.forbidden_words
        )


@dataclass(frozen=True, slots=True)
class LetterFrequency:
    """A character, in the data set also "#" or "!", occurs at least, or less than, so many times.

    Differs: the usual check puts a random letter in the place of "#" and "!".
    """

    name: ClassVar[str] = "keywords:letter_frequency"
    letter: Character
    let_frequency: Count
    let_relation: Comparison

    def is_followed(self, text: str) -> bool:
        """Whether the number of occurrences is allowed."""
        return self.let_relation.holds(text.lower().count(self.letter.lower()), self.let_frequency)


def _occurrences(keyword: str, text: str) -> int:
    return len(re.findall(re.escape(keyword), text, re.IGNORECASE))
