"""Questions as the experts' tokens, and back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from evaluation.questions import Question

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class TokenizerCodec:
    """By a tokenizer in a folder, as the router does it: a text with special tokens, messages by their template."""

    tokenizer: PreTrainedTokenizerBase

    @classmethod
    def load(cls, folder: str | Path) -> TokenizerCodec:
        """From a folder, or by hub id. Raises OSError: there is none."""
        from transformers import AutoTokenizer

        return cls(AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False))

    def encode(self, question: Question) -> list[int]:
        """The prompt; of messages with the beginning of the answer."""
        if isinstance(question.prompt, str):
            return list(self.tokenizer(question.prompt)["input_ids"])
        messages = [dict(message) for message in question.prompt]
        text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def decode(self, ids: Sequence[int]) -> str:
        """Without special tokens."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True))
