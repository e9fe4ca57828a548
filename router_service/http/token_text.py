"""What single tokens are in text and in bytes, as log-probabilities are told of."""

from __future__ import annotations

from functools import lru_cache

from transformers import PreTrainedTokenizerBase

REPLACEMENT = "\ufffd"
MOST_REMEMBERED = 65536


class TokenText:
    """The text of each token behind others: with its leading space, where it has one.

    Args:
        tokenizer: whose tokens.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self._special = frozenset(tokenizer.all_special_ids)
        self._anchor = self._find_anchor()
        self._anchor_text = tokenizer.decode([self._anchor])
        self.text_of = lru_cache(MOST_REMEMBERED)(self._text_of)
        self.bytes_of = lru_cache(MOST_REMEMBERED)(self._bytes_of)

    def _find_anchor(self) -> int:
        """An ordinary token that others are decoded behind."""
        for text in ("a", "0", "."):
            ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
            if ids and ids[-1] not in self._special and self.tokenizer.decode([ids[-1]]).strip():
                return ids[-1]
        ordinary = (each for each in sorted(self.tokenizer.get_vocab().values()) if each not in self._special)
        return next(ordinary, 0)

    def _text_of(self, token_id: int) -> str:
        """Its text; what is no whole character comes out as U+FFFD."""
        if token_id in self._special:
            return str(self.tokenizer.convert_ids_to_tokens(token_id))
        text: str = self.tokenizer.decode([self._anchor, token_id])
        if text.startswith(self._anchor_text):
            return text[len(self._anchor_text) :]
        return str(self.tokenizer.decode([token_id]))

    def _bytes_of(self, token_id: int) -> tuple[int, ...]:
        """Its bytes in UTF-8, also where they are no whole character."""
        text = self._text_of(token_id)
        if REPLACEMENT in text:
            piece = str(self.tokenizer.convert_ids_to_tokens(token_id))
            if (found := _bytes_of_piece(piece)) is not None:
                return tuple(found)
        return tuple(text.encode("utf-8", errors="replace"))


class TokenTexts:
    """The texts of the tokens of whichever tokenizer serves now."""

    def __init__(self) -> None:
        self._latest: TokenText | None = None

    def of(self, tokenizer: PreTrainedTokenizerBase) -> TokenText:
        """Made once for each tokenizer."""
        if self._latest is None or self._latest.tokenizer is not tokenizer:
            self._latest = TokenText(tokenizer)
        return self._latest


def _bytes_of_piece(piece: str) -> bytes | None:
    """The bytes that a piece of a vocabulary stands for where it is made of bytes; None where it is not."""
    if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
        return bytes([int(piece[3:5], 16)])
    by_character = _byte_by_character()
    if all(character in by_character for character in piece):
        return bytes(by_character[character] for character in piece)
    return None


@lru_cache(1)
def _byte_by_character() -> dict[str, int]:
    """Byte-level vocabularies write each byte as a visible character: printable ones as themselves, others from 256."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}
