"""A tokenizer's vocabulary as llguidance wants it: the bytes that each token adds to a text."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llguidance import LLTokenizer
    from transformers import PreTrainedTokenizerBase

DECODE_BATCH_TOKENS = 8192


def vocabulary_of(tokenizer: PreTrainedTokenizerBase, width: int, end_ids: frozenset[int]) -> LLTokenizer:
    """The vocabulary of byte-level tokenizers and those with byte fallback exactly; of any other, by decoding each
    token behind another one. Takes about a second for 100,000 tokens.

    Args:
        width: token ids are below this.
        end_ids: ids that end an answer.
    """
    import llguidance.hf
    from llguidance import LLTokenizer
    from llguidance._tokenizer import TokenizerWrapper

    ends = sorted(end_ids)
    try:
        return llguidance.hf.from_tokenizer(tokenizer, n_vocab=width, eos_token=ends)
    except ValueError:  # neither
        return LLTokenizer(TokenizerWrapper(_Decoded(tokenizer, width, ends)), n_vocab=width, eos_token=ends)


class _Decoded:
    """Tokens by their text behind another token: what a decoder does at the start of a text is left out."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, width: int, end_ids: list[int]) -> None:
        special = set(tokenizer.all_special_ids) | set(end_ids)
        self.eos_token_id = end_ids[0]
        self.bos_token_id = None
        self.special_token_ids = sorted(special)
        self.tokens = self._texts(tokenizer, width, special)

    def __call__(self, text: Any) -> list[int]:
        """Never needed: nothing is forced, so no text is cut into tokens."""
        return []

    @staticmethod
    def _texts(tokenizer: PreTrainedTokenizerBase, width: int, special: set[int]) -> list[bytes]:
        known = set(tokenizer.get_vocab().values())
        before = next(each for each in sorted(known) if each not in special)
        length = len(tokenizer.decode([before]))
        texts: list[bytes] = []
        for start in range(0, width, DECODE_BATCH_TOKENS):
            ids = range(start, min(start + DECODE_BATCH_TOKENS, width))
            pairs = [[before, each] if each in known else [before] for each in ids]
            decoded = tokenizer.batch_decode(pairs, clean_up_tokenization_spaces=False)
            texts.extend(
                f"<{each}>".encode() if each in special else text[length:].encode()
                for each, text in zip(ids, decoded, strict=True)
            )
        return texts
