"""Which tokens may come next: any vocabulary, bounded memory, and a choice among them as if there were no others."""

from __future__ import annotations

import asyncio
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from fusionroute.errors import Reason, SessionStateError
from fusionroute.fusion import Sampling, SeenTokens, choose, logprob
from router_service.constraints import MAX_COMPILED, Constraint, Constraints, Language
from tests.tiny_models import PIECES, WIDTH, character_tokenizer, word_tokenizer

END = 1
CHARACTERS = Constraints(character_tokenizer(), WIDTH, frozenset({END}))


def regex(pattern: str) -> Constraint:
    return Constraint(Language.REGEX, pattern)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A token for each byte, and the end."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({each: index for index, each in enumerate(["<eos>", *alphabet])}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")


@settings(max_examples=100)
@given(
    seed=st.integers(0, 2**32),
    share=st.sampled_from([0.05, 0.5, 0.95]),
    sampling=st.builds(
        Sampling,
        temperature=st.sampled_from([0.0, 0.5, 2.0]),
        top_k=st.sampled_from([0, 1, 5, 40]),
        top_p=st.sampled_from([1.0, 0.5]),
        min_p=st.sampled_from([0.0, 0.1]),
        repetition_penalty=st.sampled_from([1.0, 1.5]),
        presence_penalty=st.sampled_from([0.0, 1.0]),
        logit_bias=st.sampled_from([{}, {3: 100.0, 5: -100.0}]),
        seed=st.integers(0, 2**64 - 1),
    ),
)
def test_a_choice_among_some_is_the_choice_where_there_are_no_others(
    seed: int, share: float, sampling: Sampling
) -> None:
    rng = np.random.default_rng(seed)
    row = rng.normal(size=50).astype(np.float32) * 3
    allowed = rng.random(50) < share
    allowed[int(rng.integers(50))] = True
    seen = SeenTokens([3, 4])
    seen.add(7)
    choice = choose(row, sampling, 9, seen, allowed)
    assert allowed[choice.token_id]
    assert choice.logprob == logprob(row, choice.token_id)
    sunk = np.where(allowed, row, np.float32(-1e30))
    assert choose(sunk, sampling, 9, seen).token_id == choice.token_id
    assert choose(row, sampling, 9, seen, np.ones(50, np.bool_)) == choose(row, sampling, 9, seen)


async def test_every_token_is_allowed_that_the_text_could_go_on_with() -> None:
    answer = await CHARACTERS.begin(regex("[0-9]{2}é?"), [])
    names = {token: index for index, token in enumerate(PIECES, 2)}
    assert set(np.flatnonzero(answer.allowed)) == {names[each] for each in (*"0123456789", "10")}
    answer.consume([names["10"]])
    assert set(np.flatnonzero(answer.allowed)) == {names["é"], END} and not answer.is_complete
    answer.consume([names["é"]])
    assert answer.is_complete


async def test_a_character_may_take_several_tokens() -> None:
    words = byte_tokenizer()
    constraints = Constraints(words, len(words), frozenset({0}))
    answer = await constraints.begin(regex("é{2}"), [])
    ids = words("éé")["input_ids"]
    for token in ids:
        assert list(np.flatnonzero(answer.allowed)) == [token]
        answer.consume([token])
    assert len(ids) == 4 and answer.is_complete


def sentence_piece_tokenizer() -> PreTrainedTokenizerFast:
    """As Llama 2 has it: spaces as a mark, bytes for what has no token, the text's first space dropped."""
    words = ["<unk>", "<eos>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "b", "▁a", "▁ab", "ab"]
    model = models.BPE(
        {word: index for index, word in enumerate(words)}, [], unk_token="<unk>", byte_fallback=True
    )
    tokenizer = Tokenizer(model)
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(parts)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", unk_token="<unk>")


async def test_a_vocabulary_with_byte_fallback() -> None:
    words = sentence_piece_tokenizer()
    constraints = Constraints(words, len(words), frozenset({END}))
    answer = await constraints.begin(regex("( ab|é)b?"), [])

    def names() -> set[str]:
        return set(words.convert_ids_to_tokens(np.flatnonzero(answer.allowed).tolist()))

    assert names() == {"▁", "▁a", "▁ab", "<0x20>", "<0xC3>"}
    answer.consume(words.convert_tokens_to_ids(["<0xC3>"]))
    assert names() == {"<0xA9>"}
    answer.consume(words.convert_tokens_to_ids(["<0xA9>"]))
    assert names() == {"b", "<0x62>", "<eos>"}


async def test_a_vocabulary_of_words_is_constrained_by_what_they_decode_to() -> None:
    constraints = Constraints(word_tokenizer(), WIDTH, frozenset({END}))
    answer = await constraints.begin(regex(r"( w[34]){2}"), [3])
    assert list(np.flatnonzero(answer.allowed)) == [3, 4]
    answer.consume([4])
    assert answer.is_complete


async def test_what_stands_already_decides_what_may_follow() -> None:
    constraint = Constraint(
        Language.JSON_SCHEMA, '{"type": "array", "items": {"enum": [1, 10]}, "maxItems": 3}'
    )
    rng = np.random.default_rng(1)
    answer, ids = await CHARACTERS.begin(constraint, []), list[int]()
    for _ in range(20):
        ids.append(
            choose(rng.normal(size=WIDTH).astype(np.float32), Sampling(), 0, None, answer.allowed).token_id
        )
        if ids[-1] == END:
            break
        await answer.advance(ids[-1])
        again = await CHARACTERS.begin(constraint, ids)
        assert again.is_complete == answer.is_complete
        if answer.is_complete:
            break
        assert (again.allowed == answer.allowed).all()
    text = "".join(PIECES[token - 2] for token in ids if token != END)
    assert re.fullmatch(r"\[((1|10)(, ?(1|10)){0,2})?\]", text)


async def test_a_dead_end_is_an_error_and_no_token() -> None:
    answer = await CHARACTERS.begin(regex("a%"), [])
    answer.consume([int(np.flatnonzero(answer.allowed)[0])])
    assert not answer.is_complete
    with pytest.raises(SessionStateError, match=r"constraint\.regex: no token") as dead:
        _ = answer.allowed
    assert dead.value.reason is Reason.CONSTRAINT_FAILED


async def test_few_compiled_ones_are_kept_and_many_askers_share_one() -> None:
    constraints = Constraints(character_tokenizer(), WIDTH, frozenset({END}))
    await asyncio.gather(*(constraints.check(regex("a+")) for _ in range(20)))
    first = constraints._compiled[regex("a+")]
    for number in range(MAX_COMPILED - 1):
        await constraints.check(regex(f"b{{{number + 1}}}"))
    await constraints.check(regex("a+"))
    await constraints.check(regex("c+"))
    assert len(constraints._compiled) == MAX_COMPILED
    assert constraints._compiled[regex("a+")] is first and regex("b{1}") not in constraints._compiled
