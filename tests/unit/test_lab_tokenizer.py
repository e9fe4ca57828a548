"""The lab's tokenizer as a Hugging Face tokenizer that has been to disk and back."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerBase

from fusionroute.lab.tasks import evaluation_items
from fusionroute.lab.tokenizer import ALPHABET, EOS_ID, PAD_ID, VOCABULARY_SIZE, build_tokenizer, encode
from fusionroute.vocabulary import load_tokenizer, logits_width, tokenizer_fingerprint


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    folder: Path = tmp_path_factory.mktemp("tokenizer")
    build_tokenizer().save_pretrained(folder)
    return load_tokenizer(str(folder))


def test_it_has_65_tokens(tokenizer: PreTrainedTokenizerBase) -> None:
    assert VOCABULARY_SIZE == len(tokenizer) == logits_width(tokenizer) == 65


def test_every_item_survives_encoding_and_decoding(tokenizer: PreTrainedTokenizerBase) -> None:
    for item in evaluation_items(per_task=5):
        text = item.prompt + item.answer
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_the_fast_way_gives_the_same_ids(tokenizer: PreTrainedTokenizerBase) -> None:
    for text in (ALPHABET, "Hello\nWörld", "", "  two  spaces "):
        assert encode(text) == tokenizer.encode(text)


def test_no_special_tokens_are_added(tokenizer: PreTrainedTokenizerBase) -> None:
    assert len(tokenizer.encode("4+3=")) == 4


def test_a_character_outside_the_alphabet_becomes_a_question_mark(tokenizer: PreTrainedTokenizerBase) -> None:
    assert tokenizer.decode(tokenizer.encode("é4\n")) == "?4?"


def test_padding_and_end_are_two_tokens_that_decoding_can_skip(tokenizer: PreTrainedTokenizerBase) -> None:
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id) == (PAD_ID, EOS_ID)
    assert tokenizer.decode([*encode("7, ok?"), EOS_ID, PAD_ID], skip_special_tokens=True) == "7, ok?"


def test_the_fingerprint_survives_the_disk(tokenizer: PreTrainedTokenizerBase) -> None:
    assert tokenizer_fingerprint(tokenizer) == tokenizer_fingerprint(build_tokenizer())
