"""Instructions about how much an answer says."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import ClassVar

from evaluation.verifiers.instructions.arguments import ArgumentsClash, Comparison, Count, Word
from evaluation.verifiers.instructions.sentences import count_sentences

PARAGRAPH_DIVIDER = "***"
BLANK_LINE = re.compile(r"\n[^\S\n]*\n")
QUOTES = "'\"‘’“”«»„"
FIRST_WORD = re.compile(r"[\w-]*")


@dataclass(frozen=True, slots=True)
class NumberOfSentences:
    """At least, or less than, so many sentences. Differs: see `count_sentences`."""

    name: ClassVar[str] = "length_constraints:number_sentences"
    num_sentences: Count
    relation: Comparison

    def is_followed(self, text: str) -> bool:
        """Whether the number of sentences is allowed."""
        return self.relation.holds(count_sentences(text), self.num_sentences)


@dataclass(frozen=True, slots=True)
class NumberOfWords:
    """At least, or less than, so many runs of letters, digits and "_": "don't" is two of them."""

    name: ClassVar[str] = "length_constraints:number_words"
    num_words: Count
    relation: Comparison

    def is_followed(self, text: str) -> bool:
        """Whether the number of words is allowed."""
        return self.relation.holds(len(re.findall(r"\w+", text)), self.num_words)


@dataclass(frozen=True, slots=True)
class NumberOfParagraphs:
    """Exactly so many paragraphs, with the markdown divider ``***`` between them.

    A divider may stand before the first and after the last paragraph; an empty one in the middle is wrong.
    """

    name: ClassVar[str] = "length_constraints:number_paragraphs"
    num_paragraphs: Count

    def is_followed(self, text: str) -> bool:
        """Whether the number of paragraphs is right and none is empty."""
        paragraphs = inner_pieces(text, PARAGRAPH_DIVIDER)
        return all(paragraphs) and len(paragraphs) == self.num_paragraphs


@dataclass(frozen=True, slots=True)
class NthParagraphFirstWord:
    """Exactly so many paragraphs, blank lines between them, and one of them starts with a given word.

    Quotation marks before the word and punctuation after it do not matter. Differs: several blank lines divide
    like one, a line of spaces is blank, and the word may be followed by any sign, "Summary:" for example.
    """

    name: ClassVar[str] = "length_constraints:nth_paragraph_first_word"
    num_paragraphs: Count
    nth_paragraph: Count
    first_word: Word

    def __post_init__(self) -> None:
        if self.nth_paragraph > self.num_paragraphs:
            raise ArgumentsClash("nth_paragraph", f"at most num_paragraphs = {self.num_paragraphs}")

    def is_followed(self, text: str) -> bool:
        """Whether the number of paragraphs and the word are right."""
        paragraphs = [piece.strip() for piece in BLANK_LINE.split(text) if piece.strip()]
        if len(paragraphs) != self.num_paragraphs:
            return False
        start = FIRST_WORD.match(paragraphs[self.nth_paragraph - 1].lstrip(QUOTES))
        return start is not None and start.group().casefold() == self.first_word.casefold()


def inner_pieces(text: str, divider: str) -> list[str]:
    """What dividers divide, without white space around; empty pieces at both ends are left out, inner ones not."""
    pieces = [piece.strip() for piece in text.split(divider)]
    if not pieces[0]:
        pieces = pieces[1:]
    if pieces and not pieces[-1]:
        pieces = pieces[:-1]
    return pieces
