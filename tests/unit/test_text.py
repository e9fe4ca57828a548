"""Pieces of text: whole characters, together the whole decoding, cut at the first stop string."""

from collections.abc import Callable, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from router_service.text import MAX_HELD_TOKENS, REPLACEMENT, AnswerText, IncrementalText, StopMatcher

CORPUS = [
    "The quick brown fox jumps over the lazy dog, twice a day.",
    "Grüße aus Köln: schöne, weiße Straßen — naïve façades…",
    "速い茶色の狐が怠け者の犬を飛び越える。天地玄黄，宇宙洪荒。",
    "🙂🙃👩‍👩‍👧‍👦🇩🇪🏳️‍🌈 family and flags 👍🏽",
    "x = [1, 2, 3]\n\tprint(x)  # two  spaces",
]
SPECIAL = ["<s>", "</s>"]
TEXTS = st.one_of(
    st.text(max_size=30),
    st.lists(st.sampled_from([*" \n.ab", "the", "ö", "狐", "🙂", "👩‍👩‍👧‍👦", " dog"]), max_size=30).map(
        "".join
    ),
)


def byte_level() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def sentencepiece_like(decoder: decoders.Decoder) -> Tokenizer:
    """BPE over pieces with a visible space in front, unknown characters as byte tokens."""
    alphabet = sorted({*"".join(CORPUS[:2]), "\u2581"} - {" "})
    pieces = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)), *alphabet]
    merges = [
        ("\u2581", "t"),
        ("\u2581", "d"),
        ("h", "e"),
        ("\u2581t", "he"),
        ("\u2581d", "o"),
        ("\u2581do", "g"),
    ]
    pieces += [left + right for left, right in merges]
    vocabulary = {piece: place for place, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, byte_fallback=True))
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in SPECIAL])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoder
    return tokenizer


def metaspace() -> Tokenizer:
    return sentencepiece_like(
        decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="first")])
    )


def llama_like() -> Tokenizer:
    steps = [
        decoders.Replace("\u2581", " "),
        decoders.ByteFallback(),
        decoders.Fuse(),
        decoders.Strip(" ", 1, 0),
    ]
    return sentencepiece_like(decoders.Sequence(steps))


def characters() -> Tokenizer:
    alphabet = sorted(set("".join(CORPUS)))
    vocabulary = {piece: place for place, piece in enumerate([*SPECIAL, *alphabet])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="</s>"))
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in SPECIAL])
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    return tokenizer


def words() -> Tokenizer:
    """No decoder at all: tokens are joined by spaces."""
    vocabulary = {piece: place for place, piece in enumerate([*SPECIAL, "the", "dog", "ö", "🙂"])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="</s>"))
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in SPECIAL])
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return tokenizer


TOKENIZERS = {make.__name__: make() for make in (byte_level, metaspace, llama_like, characters, words)}
every_tokenizer = pytest.mark.parametrize("name", TOKENIZERS)


def decoding(tokenizer: Tokenizer) -> Callable[[Sequence[int]], str]:
    return lambda ids: tokenizer.decode(list(ids), skip_special_tokens=True)


def pieces_of(tokenizer: Tokenizer, ids: Sequence[int]) -> list[str]:
    text = IncrementalText(decoding(tokenizer))
    return [*(text.push(token_id) for token_id in ids), text.flush()]


def test_an_emoji_split_over_tokens_comes_out_whole():
    tokenizer = byte_level()
    ids = tokenizer.encode("a🦉b").ids
    assert (
        len(ids) == 5
    )  # the owl is not in the corpus: three tokens, one with the first two bytes of all emoji
    assert pieces_of(tokenizer, ids) == ["a", "", "", "🦉", "b", ""]


def test_a_leading_space_is_dropped_once_and_spaces_between_words_are_kept():
    tokenizer = metaspace()
    ids = tokenizer.encode("the dog the").ids
    assert [tokenizer.id_to_token(i) for i in ids] == ["\u2581the", "\u2581dog", "\u2581the"]
    assert pieces_of(tokenizer, ids) == ["the", " dog", " the", ""]


def test_context_keeps_the_space_between_prompt_and_answer():
    tokenizer = llama_like()
    prompt, answer = tokenizer.encode("the").ids, tokenizer.encode("dog").ids
    text = IncrementalText(decoding(tokenizer), context=prompt)
    assert [text.push(token_id) for token_id in answer] == [" dog"]


@every_tokenizer
@given(text=TEXTS)
@settings(deadline=None)
def test_pieces_of_encoded_text_are_its_decoding(name, text):
    tokenizer = TOKENIZERS[name]
    ids = tokenizer.encode(text).ids
    pieces = pieces_of(tokenizer, ids)
    assert "".join(pieces) == decoding(tokenizer)(ids)
    assert not any(REPLACEMENT in piece for piece in pieces[:-1]) or REPLACEMENT in text


@every_tokenizer
@given(data=st.data())
@settings(deadline=None)
def test_pieces_of_text_with_special_tokens_anywhere_are_its_decoding(name, data):
    tokenizer = TOKENIZERS[name]
    ids: list[int] = []
    for text in data.draw(st.lists(TEXTS, max_size=4)):
        ids += data.draw(st.lists(st.sampled_from([0, 1]), max_size=25))
        ids += tokenizer.encode(text).ids
    assert "".join(pieces_of(tokenizer, ids)) == decoding(tokenizer)(ids)


@pytest.mark.parametrize("name", ["byte_level", "characters", "words"])
@given(data=st.data())
@settings(deadline=None, max_examples=300)
def test_pieces_of_any_ids_are_their_decoding(name, data):
    tokenizer = TOKENIZERS[name]
    ids = data.draw(st.lists(st.integers(0, tokenizer.get_vocab_size() - 1), max_size=60))
    assert "".join(pieces_of(tokenizer, ids)) == decoding(tokenizer)(ids)


@pytest.mark.parametrize("name", ["metaspace", "llama_like"])
@given(data=st.data())
@settings(deadline=None)
def test_invalid_bytes_of_a_fallback_vocabulary_disturb_only_their_own_run(name, data):
    tokenizer = TOKENIZERS[name]
    first_byte = tokenizer.token_to_id("<0x00>")
    assert first_byte is not None
    garbage = [first_byte + byte for byte in data.draw(st.binary(max_size=40))]
    ids = [*tokenizer.encode("the dog").ids, *garbage, *tokenizer.encode("x the dog").ids]
    text = "".join(pieces_of(tokenizer, ids))
    assert text.startswith("the dog")
    assert text.endswith("x the dog")


@given(text=TEXTS.filter(lambda text: not text.endswith(REPLACEMENT)), after=TEXTS)
@settings(deadline=None)
def test_pieces_after_a_context_continue_its_decoding(text, after):
    for tokenizer in TOKENIZERS.values():
        context, ids = tokenizer.encode(text).ids, tokenizer.encode(after).ids
        decode = decoding(tokenizer)
        if decode(context) and not decode(context[-MAX_HELD_TOKENS:]):
            continue  # nothing but special tokens: the text begins anew
        pieces = IncrementalText(decode, context)
        answer = "".join(pieces.push(token_id) for token_id in ids) + pieces.flush()
        assert decode(context) + answer == decode(context + ids)


@every_tokenizer
@pytest.mark.parametrize("kind", ["text", "special", "garbage"])
def test_the_cost_of_a_token_does_not_grow_with_the_text(name, kind):
    tokenizer = TOKENIZERS[name]
    continuation_byte = tokenizer.token_to_id("\u0122") or tokenizer.token_to_id("<0x80>") or 3
    ids = {
        "text": tokenizer.encode("the dog ").ids * 300,
        "special": [0] * 900,
        "garbage": [continuation_byte] * 900,
    }
    longest = 0

    def decode(window: Sequence[int]) -> str:
        nonlocal longest
        longest = max(longest, len(window))
        return decoding(tokenizer)(window)

    text = IncrementalText(decode)
    for token_id in ids[kind]:
        text.push(token_id)
    assert longest <= 3 * MAX_HELD_TOKENS


def cut_naively(text: str, stops: Sequence[str]) -> tuple[str, str | None]:
    """The reference: looks at every end of the whole text, the longest stop string first."""
    for end in range(1, len(text) + 1):
        for stop in sorted(stops, key=len, reverse=True):
            if text[:end].endswith(stop):
                return text[: end - len(stop)], stop
    return text, None


AB = st.text(alphabet="abc", max_size=12)
STOPS = st.lists(st.text(alphabet="abc", min_size=1, max_size=5), max_size=4)


@given(pieces=st.lists(AB, max_size=8), stops=STOPS)
@settings(max_examples=1000)
def test_stopping_agrees_with_a_search_of_the_whole_text(pieces, stops):
    matcher = StopMatcher(stops)
    shown = [matcher.push(piece) for piece in pieces]
    shown.append(matcher.flush())
    assert ("".join(shown), matcher.matched) == cut_naively("".join(pieces), stops)


@given(pieces=st.lists(AB, max_size=8), stops=STOPS)
@settings(max_examples=500)
def test_no_more_is_held_back_than_could_begin_a_stop_string(pieces, stops):
    matcher = StopMatcher(stops)
    seen = shown = ""
    for piece in pieces:
        seen, shown = seen + piece, shown + matcher.push(piece)
        if matcher.matched is None:
            held = seen[len(shown) :]
            assert held == "" or any(stop.startswith(held) for stop in stops)


def test_text_that_looked_like_a_stop_string_is_shown_in_the_end():
    matcher = StopMatcher(["\n\nQ:"])
    assert [matcher.push(piece) for piece in ("a\n", "\n", "Q", "A")] == ["a", "", "", "\n\nQA"]
    assert (matcher.push("\n\nQ"), matcher.flush(), matcher.matched) == ("", "\n\nQ", None)


def test_nothing_comes_after_a_stop_string():
    matcher = StopMatcher(["stop"])
    assert (matcher.push("go stop go"), matcher.push("more"), matcher.flush()) == ("go ", "", "")
    assert matcher.matched == "stop"


def test_an_answer_ends_before_a_stop_string_split_over_tokens_and_characters():
    tokenizer = byte_level()
    ids = tokenizer.encode("fine 🦉🦊 never shown").ids
    answer = AnswerText(decoding(tokenizer), stops=["🦊 n"])
    shown = []
    for token_id in ids:
        shown.append(answer.push(token_id))
        if answer.stop:
            break
    assert "".join(shown) + answer.finish() == "fine 🦉"
    assert answer.stop == "🦊 n"


def test_an_answer_that_ends_within_a_character_shows_that_something_is_missing():
    tokenizer = byte_level()
    answer = AnswerText(decoding(tokenizer), stops=["zzz"])
    shown = [answer.push(token_id) for token_id in tokenizer.encode("z🦉").ids[:-1]]
    assert ("".join(shown), answer.finish()) == ("", "z" + REPLACEMENT)


@given(text=TEXTS, stops=STOPS)
@settings(deadline=None)
def test_the_same_ids_give_the_same_pieces(text, stops):
    tokenizer = TOKENIZERS["byte_level"]
    first, second = (AnswerText(decoding(tokenizer), stops) for _ in range(2))
    for token_id in tokenizer.encode(text).ids:
        assert first.push(token_id) == second.push(token_id)
    assert first.finish() == second.finish()
