"""Tokens as text and bytes, for vocabularies of words, of bytes, and with byte fallback."""

from __future__ import annotations

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from router_service.http.token_text import TokenText
from tests.tiny_models import word_tokenizer


def byte_level() -> PreTrainedTokenizerFast:
    """Every byte is a token, and so is " a"."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {character: index for index, character in enumerate([*alphabet, "Ġa"])}
    tokenizer = Tokenizer(models.BPE(vocabulary, [("Ġ", "a")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def with_byte_fallback() -> PreTrainedTokenizerFast:
    """Words that begin with a mark for their space; unknown characters as bytes."""
    pieces = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁a", "▁b", "b"]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


def test_words_have_the_space_before_them_and_special_tokens_their_name() -> None:
    text = TokenText(word_tokenizer())
    assert [text.text_of(token) for token in (5, 1)] == [" w5", "<eos>"]
    assert bytes(text.bytes_of(5)) == b" w5"


def test_half_characters_have_their_bytes() -> None:
    tokenizer = byte_level()
    text = TokenText(tokenizer)
    ids = tokenizer.encode("a a é€")
    assert b"".join(bytes(text.bytes_of(token)) for token in ids) == "a a é€".encode()
    assert text.text_of(ids[1]) == " a"
    assert text.text_of(ids[-1]) == "\ufffd"


def test_byte_tokens_have_their_byte_and_words_their_space() -> None:
    tokenizer = with_byte_fallback()
    text = TokenText(tokenizer)
    a, byte = tokenizer.convert_tokens_to_ids(["▁a", "<0xE2>"])
    assert (text.text_of(a), bytes(text.bytes_of(a))) == (" a", b" a")
    assert (text.text_of(byte), bytes(text.bytes_of(byte))) == ("\ufffd", b"\xe2")
