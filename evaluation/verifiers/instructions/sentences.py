"""How many sentences a text has, by rule.

The benchmark counts with the English model of nltk's punkt, which has to be downloaded apart from the package. This
rule needs nothing and says what it does:

- A sentence ends with ".", "!", "?" or their likes of other scripts, perhaps with closing quotes or brackets after
  them, before white space or at the end of the text; "。" and its kin need no white space. What is left over at the
  end counts.
- Something without a letter or digit is no sentence; nor is the number of a list item, "1." at the start of a line
  (punkt mostly counts those).
- A full stop does not end one after a title (Dr.), an initial (J.), "e.g.", "U.S.", unless the line ends; nor, before a
  small letter, after "etc.", "p.m." and the like.
- Before a small letter, neither three full stops end one nor a question or shout in quotation marks.
- Line ends end nothing, as with punkt: a heading without a mark belongs to the sentence after it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

CLOSERS = "\"'”’»)]}*_`"
OPENERS = "\"'“‘«([{*_`#>"
UNSPACED_MARKS = re.compile(r"[。！？｡]+")
MARKS = ".!?…।॥۔؟"
LIST_NUMBER = re.compile(r"(?:\d{1,3}|[A-Za-z]|[ivxIVX]{1,5})\.")
INITIAL = re.compile(r"[A-HJ-Z]\.|(?:[A-Z][a-z]?\.){2,}")
NEVER_LAST = re.compile(
    r"(?i:mr|mrs|ms|mx|dr|prof|vs|e\.g|i\.e|cf)\.|(?:St|Rev|Hon|Gen|Col|Capt|Lt|Sgt|Gov|Sen|Rep|Fr|Mt)\."
)
OFTEN_INSIDE = re.compile(
    r"(?:[a-z]\.){2,}|(?i:etc|jr|sr|inc|ltd|co|corp|dept|est|approx|ave|blvd|al|jan|feb|mar|apr|aug|sept|oct|nov|dec)\."
)


def count_sentences(text: str) -> int:
    """The number of sentences in `text`, by the rule above; 0 for a text without letters and digits."""
    count = 0
    is_open = False
    for word, following in _with_following(text):
        *finished, rest = UNSPACED_MARKS.split(word.text)
        for piece in finished:
            count += is_open or _says_something(piece)
            is_open = False
        if word.is_first and not word.is_last and LIST_NUMBER.fullmatch(rest):
            continue
        is_open = is_open or _says_something(rest)
        if is_open and _ends_sentence(rest, following, is_last=word.is_last):
            count += 1
            is_open = False
    return count + is_open


class _Word(NamedTuple):
    """What stands between white space; the first or the last of its line, or neither."""

    text: str
    is_first: bool
    is_last: bool


def _with_following(text: str) -> Iterator[tuple[_Word, str]]:
    """Each word with the next one of the text, "" after the last."""
    lines = [line.split() for line in text.split("\n")]
    words = [
        _Word(word, index == 0, index + 1 == len(line)) for line in lines for index, word in enumerate(line)
    ]
    return zip(words, [*(word.text for word in words[1:]), ""][: len(words)], strict=True)


def _ends_sentence(word: str, following: str, *, is_last: bool) -> bool:
    """Whether a sentence ends after `word`.

    Args:
        following: the next word of the text; "" at its end.
        is_last: whether the line ends here.
    """
    body = word.rstrip(CLOSERS)
    if not body or body[-1] not in MARKS:
        return False
    if not following:
        return True
    goes_on = following.lstrip(OPENERS)[:1].islower()
    if body.endswith(("...", "…")) or (len(body) < len(word) and body[-1] in "!?"):
        return not goes_on  # "Stop!" he said
    if body[-1] != "." or is_last:
        return True
    bare = body.lstrip(OPENERS)
    if INITIAL.fullmatch(bare) or NEVER_LAST.fullmatch(bare):
        return False
    return not (goes_on and OFTEN_INSIDE.fullmatch(bare))


def _says_something(piece: str) -> bool:
    return any(map(str.isalnum, piece))
