"""From scripts to token ids and marks: which tokens are targets, where a text ends, where it is cut.

The prompt's tokens are those of the prompt alone, because that is what a served model is given; only then come the
tokens of the answer. Marks go by length, never by token id, so EOS is a target even where it is the padding too.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING

from fusionroute.errors import InvalidRequest, Reason
from fusionroute.vocabulary import end_ids as known_end_ids
from trainer.data.rendering import Script

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_ANCHOR = "\n"


@dataclass(frozen=True, slots=True)
class Encoded:
    """A script as tokens.

    Attributes:
        ids: token ids, not yet cut.
        marks: 1 where the token is a target, of the same length; never at position 0.
    """

    ids: list[int]
    marks: bytearray

    def cut(self, max_tokens: int) -> Encoded:
        """The first `max_tokens` tokens."""
        if len(self.ids) <= max_tokens:
            return self
        return Encoded(self.ids[:max_tokens], self.marks[:max_tokens])

    @property
    def num_targets(self) -> int:
        """Tokens to be learnt."""
        return self.marks.count(1)


def model_end_ids(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """The tokens at which a service of the tokenizer's model stops: EOS, and what the generation settings add.

    They are read from the folder or hub id that the tokenizer was loaded from; without them EOS stands alone.
    """
    from transformers import AutoConfig, GenerationConfig

    origin = tokenizer.name_or_path
    if not origin:
        return known_end_ids(tokenizer)
    try:
        settings: object = GenerationConfig.from_pretrained(origin)
    except (OSError, ValueError):
        try:
            settings = AutoConfig.from_pretrained(origin, trust_remote_code=False)
        except (OSError, ValueError):
            settings = None
    return known_end_ids(tokenizer, settings)


class Encoder:
    """Encodes scripts for one vocabulary.

    Args:
        tokenizer: of the models.
        end_of_text: whether EOS is appended to whole texts that no template has ended.
        end_ids: tokens that end an answer; None = `model_end_ids`.

    Raises:
        InvalidRequest: INVALID_FIELD, EOS is to be appended but the tokenizer has none.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        end_of_text: bool = True,
        end_ids: Iterable[int] | None = None,
    ) -> None:
        if end_of_text and tokenizer.eos_token_id is None:
            raise InvalidRequest(
                Reason.INVALID_FIELD,
                "end_of_text = True is not allowed: the tokenizer has no EOS token",
                metadata={"field": "end_of_text"},
            )
        self._tokenizer = tokenizer
        self._eos_id = tokenizer.eos_token_id if end_of_text else None
        self._end_ids = frozenset(end_ids) if end_ids is not None else model_end_ids(tokenizer)

    def encode(self, scripts: Sequence[Script]) -> list[Encoded]:
        """All scripts, through the tokenizer in two calls."""
        ids = {
            special: self._all_prefixes([s for s in scripts if s.has_template is not special], special)
            for special in (True, False)
        }
        return [self._assemble(script, ids[not script.has_template]) for script in scripts]

    def prompt_ids(self, text: str, *, has_template: bool) -> list[int]:
        """The tokens of a prompt alone, as the router service encodes it."""
        return self._batch([text], special=not has_template)[0]

    def _all_prefixes(self, scripts: Sequence[Script], special: bool) -> dict[str, list[int]]:
        """Ids of every script up to the end of each of its pieces; equal texts are encoded once."""
        texts = list(dict.fromkeys(text for script in scripts for text in accumulate(script.pieces)))
        return dict(zip(texts, self._batch(texts, special), strict=True))

    def _batch(self, texts: Sequence[str], special: bool) -> list[list[int]]:
        if not texts:
            return []
        encoded = self._tokenizer(
            list(texts),
            add_special_tokens=special,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )
        ids: list[list[int]] = encoded["input_ids"]
        return ids

    def _assemble(self, script: Script, ids_of: dict[str, list[int]]) -> Encoded:
        ids: list[int] = []
        marks = bytearray()
        segments = self._segments(script, ids_of)
        for index, (segment, learnt) in enumerate(zip(segments, script.learnt, strict=True)):
            num_targets = self._end_of_turn(segment) if script.has_template else len(segment)
            if index == len(segments) - 1:
                segment = self._ending(script, segment[:num_targets])
                num_targets = len(segment)
            ids += segment
            marks += bytes([learnt]) * num_targets + bytes(len(segment) - num_targets)
        marks[:1] = bytes(len(marks[:1]))  # nothing precedes the first token, so nothing can predict it
        return Encoded(ids, marks)

    def _segments(self, script: Script, ids_of: dict[str, list[int]]) -> list[list[int]]:
        """The tokens of each piece: of the whole text where these begin with the tokens of every part of it."""
        texts = list(accumulate(script.pieces))
        whole = ids_of[texts[-1]]
        bounds = [0]
        for text in texts:
            part = ids_of[text]
            if whole[: len(part)] != part:
                first = ids_of[texts[0]]
                return [first, *(self._continuation(piece) for piece in script.pieces[1:])]
            bounds.append(len(part))
        return [whole[start:end] for start, end in pairwise(bounds)]

    def _continuation(self, text: str) -> list[int]:
        """The tokens of a text that stands behind another one: without what begins a text, such as a space."""
        anchor, behind = self._batch([_ANCHOR, _ANCHOR + text], special=False)
        if behind[: len(anchor)] == anchor:
            return behind[len(anchor) :]
        return self._batch([text], special=False)[0]

    def _end_of_turn(self, segment: list[int]) -> int:
        """Tokens up to the one that ends the turn, that one included; blanks behind it are never generated."""
        for index in range(len(segment) - 1, -1, -1):
            if segment[index] in self._end_ids:
                rest = self._tokenizer.decode(segment[index + 1 :], skip_special_tokens=False)
                return index + 1 if not rest.strip() else len(segment)
        return len(segment)

    def _ending(self, script: Script, segment: list[int]) -> list[int]:
        """The last piece with its end where it is whole, without one where it was cut off."""
        has_end = bool(segment) and segment[-1] in self._end_ids
        if not script.ended:
            return segment[:-1] if has_end and script.has_template else segment
        if has_end or self._eos_id is None:
            return segment
        return [*segment, self._eos_id]
