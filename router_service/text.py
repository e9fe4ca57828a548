"""From token ids to text, piece by piece: whole characters only, and never beyond a stop string.

Both classes are pure functions of what they were fed, so whoever feeds the same ids gets the same pieces.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

REPLACEMENT = "\ufffd"

MAX_HELD_TOKENS = 8
"""Tokens after which a character that is still incomplete never will be: UTF-8 takes four bytes at most."""


class IncrementalText:
    """Turns ids into pieces of text that together are the decoding of all ids.

    A decoder may treat the start of a text specially (sentencepiece drops a leading space) and needs all
    bytes of a character at once. So each step decodes a short window: a few tokens whose text is out already,
    for context, and those whose text is not. The cost of a token does not grow with the text.

    Bytes that are no UTF-8 come out as U+FFFD: for byte-level vocabularies as many as the whole decoding has.
    Decoders with byte fallback replace a whole run of byte tokens when one of them is wrong; what is out of
    such a run already stays.

    Args:
        decode: ids to text, special tokens skipped, no clean-up of spaces.
        context: the tokens before the first piece, for example the prompt. The last few of them decide
            whether a leading space is part of the text; where those are all special tokens, it is not.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], context: Sequence[int] = ()) -> None:
        self._decode = decode
        self._context = self._without_half_characters(context)
        self._held: list[int] = []
        self._window_text = decode(self._context) if self._context else ""
        self._num_out = len(self._window_text.rstrip(REPLACEMENT))
        self._num_incomplete = 0  # so many tokens in a row left a character incomplete

    def push(self, token_id: int) -> str:
        """The text that becomes certain with this token; often empty, never half a character."""
        text = self._decode([*self._context, *self._held, token_id])
        if text == self._window_text and self._has_no_text(token_id):
            return ""
        self._held.append(token_id)
        self._window_text = text
        is_whole = not text.endswith(REPLACEMENT)
        self._num_incomplete = 0 if is_whole else self._num_incomplete + 1
        if self._num_incomplete > MAX_HELD_TOKENS:
            return self._give_up_on_all_but_the_last_character()
        num_certain = len(text.rstrip(REPLACEMENT))
        piece = text[self._num_out : num_certain]
        self._num_out = max(self._num_out, num_certain)
        if piece and is_whole:
            self._context, self._held = self._held, []
            self._window_text = self._decode(self._context)
            self._num_out = len(self._window_text)
        return piece

    def flush(self) -> str:
        """What is still held back, at the end of the text: a character that was never completed."""
        if not self._held:
            return ""
        piece = self._window_text[self._num_out :]
        self._num_out = len(self._window_text)
        return piece

    def _without_half_characters(self, context: Sequence[int]) -> list[int]:
        """The last few tokens of `context`, beginning where a character begins."""
        for num_tokens in range(MAX_HELD_TOKENS, MAX_HELD_TOKENS + 4):
            last = list(context[-num_tokens:])
            if not self._decode(last).startswith(REPLACEMENT):
                break
        return last

    def _has_no_text(self, token_id: int) -> bool:
        """Whether a token, a special one say, never has text. Twice: decoders drop one space at the start."""
        return not self._decode([token_id, token_id])

    def _give_up_on_all_but_the_last_character(self) -> str:
        """These bytes are no UTF-8; what they begin with stays U+FFFD whatever comes."""
        piece = self._window_text[self._num_out : -1]
        last = self._held[-MAX_HELD_TOKENS:]
        self._context, self._held = last[:-1], last[-1:]
        self._window_text = self._decode(last)
        self._num_out = len(self._window_text) - 1
        self._num_incomplete = len(last)
        return piece


class StopMatcher:
    """Passes text on up to the first stop string, and holds back what may be the beginning of one.

    The first stop string is the one that is *complete* first, the longest if several end at the same
    character: so the answer does not depend on how the text was cut into pieces.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        assert all(stops), "an empty stop string"
        self._automata = [_Automaton(stop) for stop in sorted(set(stops), key=len, reverse=True)]
        self._held = ""
        self.matched: str | None = None
        """The stop string that ended the text, once there is one."""

    def push(self, text: str) -> str:
        """What is certain now to come before any stop string."""
        if self.matched is not None:
            return ""
        if not self._automata:
            return text
        text = self._held + text
        for end in range(len(self._held), len(text)):
            for automaton in self._automata:
                if automaton.advance(text[end]) and self.matched is None:
                    self.matched = automaton.stop
            if self.matched is not None:
                self._held = ""
                return text[: end + 1 - len(self.matched)]
        num_held = max(automaton.num_matched for automaton in self._automata)
        certain = len(text) - num_held
        self._held = text[certain:]
        return text[:certain]

    def flush(self) -> str:
        """What is still held back, at the end of the text: what only looked like a stop string."""
        held, self._held = self._held, ""
        return held


class _Automaton:
    """Knuth-Morris-Pratt: how much of one stop string the text ends with."""

    def __init__(self, stop: str) -> None:
        self.stop = stop
        self.num_matched = 0
        self._fallback = [0] * (len(stop) + 1)  # by matched length: the next shorter one that may still match
        for length in range(1, len(stop)):
            self._fallback[length + 1] = self._extend(self._fallback[length], stop[length])

    def advance(self, character: str) -> bool:
        """Whether the text ends with the stop string, `character` being its last."""
        self.num_matched = self._extend(self.num_matched, character)
        return self.num_matched == len(self.stop)

    def _extend(self, matched: int, character: str) -> int:
        while matched and self.stop[matched] != character:
            matched = self._fallback[matched]
        return matched + 1 if self.stop[matched] == character else 0


class AnswerText:
    """An answer's text from its ids: whole characters, ended by the first stop string.

    Args:
        decode: as for `IncrementalText`.
        stops: as for `StopMatcher`.
        context: the tokens before the answer, at least the last few of them.
    """

    def __init__(
        self, decode: Callable[[Sequence[int]], str], stops: Sequence[str] = (), context: Sequence[int] = ()
    ) -> None:
        self._text = IncrementalText(decode, context)
        self._matcher = StopMatcher(stops)

    @property
    def stop(self) -> str | None:
        """The stop string that ended the answer, once there is one; push nothing more then."""
        return self._matcher.matched

    def push(self, token_id: int) -> str:
        """What this token adds to the text that may be shown."""
        return self._matcher.push(self._text.push(token_id))

    def finish(self) -> str:
        """What was held back and is certain now that no token follows; empty after a stop string."""
        return self._matcher.push(self._text.flush()) + self._matcher.flush()
