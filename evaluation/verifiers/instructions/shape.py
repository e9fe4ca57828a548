"""Instructions about case, the first and last characters, and punctuation."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import ClassVar

from evaluation.verifiers.instructions.arguments import Comparison, Count, Text
from evaluation.verifiers.instructions.language import language_of

# Apostrophes, hyphens, full stops and "&" inside a word belong to it: DON'T, CO-OP, U.S.A, R&D.
WORD = re.compile(r"\w+(?:['’.&-]\w+)*")


@dataclass(frozen=True, slots=True)
class EnglishCapital:
    """English, and no letter that has a capital form is small.

    Differs: the language is found in the small letters of the same text, see `language_of`.
    """

    name: ClassVar[str] = "change_case:english_capital"

    def is_followed(self, text: str) -> bool:
        """Whether it is."""
        return text.isupper() and language_of(text) == "en"


@dataclass(frozen=True, slots=True)
class EnglishLowercase:
    """English, without a capital letter."""

    name: ClassVar[str] = "change_case:english_lowercase"

    def is_followed(self, text: str) -> bool:
        """Whether it is."""
        return text.islower() and language_of(text) == "en"


@dataclass(frozen=True, slots=True)
class CapitalWordFrequency:
    """At least, or less than, so many words in capitals, "I" and "A" among them.

    Differs: a word is a run of letters and digits, with apostrophes, hyphens, full stops and "&" only inside;
    "DON'T" is one word.
    """

    name: ClassVar[str] = "change_case:capital_word_frequency"
    capital_frequency: Count
    capital_relation: Comparison

    def is_followed(self, text: str) -> bool:
        """Whether the number of words in capitals is allowed."""
        count = sum(word.isupper() for word in WORD.findall(text))
        return self.capital_relation.holds(count, self.capital_frequency)


@dataclass(frozen=True, slots=True)
class EndChecker:
    """The answer ends with a phrase, nothing after it but a quotation mark; case does not count."""

    name: ClassVar[str] = "startend:end_checker"
    end_phrase: Text

    def is_followed(self, text: str) -> bool:
        """Whether it does."""
        return text.strip().strip('"').lower().endswith(self.end_phrase.lower())


@dataclass(frozen=True, slots=True)
class Quotation:
    """The whole answer stands between double quotation marks."""

    name: ClassVar[str] = "startend:quotation"

    def is_followed(self, text: str) -> bool:
        """Whether it does."""
        text = text.strip()
        return len(text) > 1 and text.startswith('"') and text.endswith('"')


@dataclass(frozen=True, slots=True)
class NoComma:
    """No comma anywhere."""

    name: ClassVar[str] = "punctuation:no_comma"

    def is_followed(self, text: str) -> bool:
        """Whether there is none."""
        return "," not in text
