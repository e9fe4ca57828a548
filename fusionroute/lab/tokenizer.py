"""The lab's character tokenizer: 65 tokens, one per character, as an ordinary Hugging Face fast tokenizer."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

PAD_TOKEN, EOS_TOKEN = "<pad>", "<eos>"
PAD_ID, EOS_ID = 0, 1
ALPHABET = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJ0123456789 :;,.?!=+-*/[]()_"
VOCABULARY_SIZE = 2 + len(ALPHABET)
MAX_CONTEXT_TOKENS = 512
UNKNOWN_CHARACTER = "?"
CHAT_TEMPLATE = (
    "{% set ns = namespace(first=0) %}"
    "{% for message in messages %}{% if message.role == 'user' %}"
    "{% set ns.first = loop.index0 %}{% endif %}{% endfor %}"
    "{% for message in messages[ns.first:] %}{{ message.content }}"
    "{% if message.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
)
"""The last thing a user said, as it stands, and what was answered: the models have only ever seen a single task."""

_ID_BY_CHARACTER = {character: index for index, character in enumerate(ALPHABET, start=2)}


def encode(text: str) -> list[int]:
    """Token ids of a text without special tokens; the ids of `build_tokenizer()`, only faster."""
    unknown = _ID_BY_CHARACTER[UNKNOWN_CHARACTER]
    return [_ID_BY_CHARACTER.get(character, unknown) for character in text]


def build_tokenizer() -> PreTrainedTokenizerFast:
    """The tokenizer as `transformers` knows it; `save_pretrained` writes it to disk.

    It adds no special tokens of its own. A character outside the alphabet becomes ``?``: visible, never
    dropped.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {PAD_TOKEN: PAD_ID, EOS_TOKEN: EOS_ID, **_ID_BY_CHARACTER}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN_CHARACTER))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD_TOKEN,
        eos_token=EOS_TOKEN,
        clean_up_tokenization_spaces=False,
        model_max_length=MAX_CONTEXT_TOKENS,
        chat_template=CHAT_TEMPLATE,
    )
