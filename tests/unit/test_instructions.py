"""Each kind of instruction: right and wrong answers, its limits, and what wrong arguments are told."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evaluation.questions import Answer, Question
from evaluation.verifiers.instructions.judging import (
    Strictness,
    followed,
    part_names,
    variants,
    verify,
    verify_loosely,
)
from evaluation.verifiers.instructions.language import LANGUAGES, language_of
from evaluation.verifiers.instructions.registry import KINDS, instruction
from fusionroute.errors import InvalidRequest, Reason
from tests.instruction_answers import OTHERS, SPOILERS, follow

ENGLISH = "The children went down to the river in the morning and came back late."

EXAMPLES: dict[str, tuple[dict[str, Any], list[str], list[str]]] = {
    "keywords:existence": (
        {"keywords": ["river", "c++"]},
        ["Rivers run. I know C++ well", "RIVER\nc++"],
        ["a river", "c and rivers", "riv er c++"],
    ),
    "keywords:frequency": (
        {"keyword": "peace", "frequency": 3, "relation": "at least"},
        ["Peace, peace, PEACE", "peaceful peacepeace"],
        ["peace peace", "pea ce peace peace"],
    ),
    "keywords:forbidden_words": (
        {"forbidden_words": ["rock", "it's"]},
        ["A rocket and a shamrock", "its rock_2"],
        ["Rock!", "a *rock* band", "IT'S fine", "naïve rock"],
    ),
    "keywords:letter_frequency": (
        {"letter": "Ö", "let_frequency": 2, "let_relation": "less than"},
        ["schön", "o o o"],
        ["Öl und Wörter", "öö"],
    ),
    "language:response_language": (
        {"language": "fi"},
        [OTHERS["fi"], OTHERS["fi"].upper(), f"**{OTHERS['fi']}** 12345"],
        [ENGLISH, "12345", "私は毎日電車で会社に行きます。", OTHERS["de"].upper()],
    ),
    "length_constraints:number_paragraphs": (
        {"num_paragraphs": 2},
        ["one\n***\ntwo", "***\n1. one\n***\n2. two\n***", "a *** b"],
        ["one", "one\n\ntwo", "one\n***\n***", "one\n***\n***\ntwo", "1\n***\n2\n***\n3"],
    ),
    "length_constraints:number_words": (
        {"num_words": 4, "relation": "at least"},
        ["one two three four", "don't stop now", "ein zwölf три 四"],
        ["one two three", "... !!! ??? ,,,", "don't stop"],
    ),
    "length_constraints:number_sentences": (
        {"num_sentences": 3, "relation": "less than"},
        [
            "Dr. J. Doe left at 5 p.m. yesterday. Fine",
            "1. Eat.\n2. Sleep.",
            '"Stop!" he said. Then he left.',
            "...",
        ],
        ["One. Two. three.", "What? No! Yes", "今天好。我们去。再见。", "(One.) *Two.* “Three.”"],
    ),
    "length_constraints:nth_paragraph_first_word": (
        {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "weekend"},
        [
            "Hello.\n\nWeekend: at last",
            'Hello\n \n"Weekend" it is',
            "Hello\n\n\n\nWeekend",
            "\n\na\nb\n\nweekend\n\n",
        ],
        [
            "Weekend.\n\nHello",
            "a\n\nb\n\nweekend",
            "a\nweekend",
            "a\n\nweekends",
            "a\n\n**weekend**",
            "a\n\n!",
        ],
    ),
    "detectable_content:postscript": (
        {"postscript_marker": "P.P.S"},
        ["Bye.\nP.P.S. more", "Bye.\np. p. s: more"],
        ["Bye.\nP.S. more", "PPS more", "Bye"],
    ),
    "detectable_content:number_placeholders": (
        {"num_placeholders": 2},
        ["[name] [street]", "[a][b]", "[[a] x [b]]", "[x](http://y) and [ä]"],
        ["[name]", "[a\nb] [c]", "]a[ [b]", "(a) (b)"],
    ),
    "detectable_format:number_bullet_lists": (
        {"num_bullets": 2},
        ["* a\n* b", "text\n  - a\n\t*b\nend", "**Title**\n- a\n- b\n---", "***\n* a\n***\n* b"],
        ["* a", "* a\n* b\n- c", "1. a\n2. b", "**a**\n**b**", "• a\n• b", "*\n*"],
    ),
    "detectable_format:title": (
        {},
        ["<<A title>>\ntext", "text << ü >>", "<<<x>>>"],
        ["<<>>", "<< >>", "<<a\nb>>", "<title>", ">>a<<"],
    ),
    "detectable_format:constrained_response": (
        {},
        ["My answer is yes.", "Well. My answer is maybe. Perhaps"],
        ["Yes.", "my answer is yes.", "My answer is yes"],
    ),
    "detectable_format:number_highlighted_sections": (
        {"num_highlights": 2},
        ["*one* and **two**", "***a*** *b*", "* item with *one*\n* and **two words**"],
        ["*one*", "** ** and * *", "*one\ntwo* *", "***a***", "* a\n* b"],
    ),
    "detectable_format:multiple_sections": (
        {"section_spliter": "SECTION", "num_sections": 2},
        ["SECTION 1\na\nSECTION 2\nb", "SECTION1 SECTION 10"],
        ["SECTION 1\na", "Section 1\nSection 2", "SECTION A SECTION B"],
    ),
    "detectable_format:json_format": (
        {},
        ['{"a": {"b": [1, {"c": null}]}}', '```json\n{"a": 1}\n```', "```\n[]\n```", ' \n"ä"\n', "1" * 5000],
        ["{'a': 1}", 'Sure: {"a": 1}', '{"a": NaN}', '{"a": 1} {"b": 2}', "[" * 100_000, "```json\n```"],
    ),
    "combination:repeat_prompt": (
        {"prompt_to_repeat": "Write a poem, now!"},
        ["Write a poem, now!\nRoses", "\n write a POEM, now!"],
        ["Roses. Write a poem, now!", "Write a poem now", '"Write a poem, now!"'],
    ),
    "combination:two_responses": (
        {},
        ["a\n******\nb", "******\na\n******\nb\n******"],
        ["a\n***\nb", "a ****** a", "a\n******", "a******b******c", "a************b"],
    ),
    "change_case:english_capital": (
        {},
        [ENGLISH.upper(), f'"{ENGLISH.upper()}" 12'],
        [ENGLISH, "LES ENFANTS SONT DESCENDUS À LA RIVIÈRE CE MATIN AVEC LEUR MÈRE.", "123"],
    ),
    "change_case:english_lowercase": (
        {},
        [ENGLISH.lower(), f"{ENGLISH.lower()} 12!"],
        [ENGLISH, "les enfants sont descendus à la rivière ce matin avec leur mère.", "123"],
    ),
    "change_case:capital_word_frequency": (
        {"capital_frequency": 2, "capital_relation": "at least"},
        ["NASA and I", "DON'T you KNOW", "ÜBER-ALT or A.B.C"],
        ["NASA", "Nasa And We", "DON'T go", "1 2 3"],
    ),
    "startend:end_checker": (
        {"end_phrase": "That is all you need!"},
        ["So. That is all you need!", '"So. THAT is all you need!"\n'],
        ["That is all you need! Bye", "That is all you need"],
    ),
    "startend:quotation": ({}, ['"a"', ' "a "b" c"\n', '""'], ['"', '"a', "'a'", "“a”", 'x "a"']),
    "punctuation:no_comma": ({}, ["a; b", "a、b"], ["a, b", "1,000"]),
}


def test_there_are_examples_of_every_kind():
    assert EXAMPLES.keys() == KINDS.keys()
    assert len(KINDS) == 25


@pytest.mark.parametrize("name", KINDS)
def test_right_answers_are_right_and_wrong_ones_wrong(name):
    arguments, right, wrong = EXAMPLES[name]
    given = instruction(name, arguments, "x")
    assert [text for text in right if not given.is_followed(text)] == []
    assert [text for text in wrong if given.is_followed(text)] == []


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("strictness", Strictness)
def test_a_blank_answer_follows_nothing(name, strictness):
    given = instruction(name, EXAMPLES[name][0], "x")
    assert followed([given], "", strictness) == followed([given], " \n\t ", strictness) == [False]


@given(text=st.text(max_size=300))
@settings(max_examples=30, deadline=None)
def test_any_text_is_judged_without_an_error_and_loosely_no_worse_than_strictly(text):
    given = [instruction(name, arguments, "x") for name, (arguments, _, _) in EXAMPLES.items()]
    strict, loose = (followed(given, text, strictness) for strictness in Strictness)
    assert all(loosely or not strictly for strictly, loosely in zip(strict, loose, strict=True))


@pytest.mark.parametrize(("piece", "num_followed"), [("[", 4), ("<<", 4), (" ", 4), ("a\n", 5)])
def test_two_hundred_thousand_signs_are_judged_too(piece, num_followed):
    """What takes quadratic time does not end before the suite's timeout."""
    given = [
        instruction(name, arguments, "x")
        for name, (arguments, _, _) in EXAMPLES.items()
        if not name.startswith(("language:", "change_case:english"))  # langdetect reads no more than 10,000
    ]
    assert sum(followed(given, piece * 200_000 + "a", Strictness.STRICT)) == num_followed


ARGUMENT_FAULTS = [
    (
        "keywords:frequency",
        {"frequency": 0},
        "frequency = 0 is not allowed: a whole number between 1 and 1000000",
    ),
    ("keywords:frequency", {"frequency": 1.5}, "frequency = 1.5 is not allowed"),
    ("keywords:frequency", {"frequency": True}, "frequency = True is not allowed"),
    ("keywords:frequency", {"frequency": float("nan")}, "frequency = nan is not allowed"),
    ("keywords:frequency", {"frequency": None}, "frequency = None is not allowed"),
    ("keywords:frequency", {"relation": "at most"}, '\'at most\' is not allowed: "less than" or "at least"'),
    ("keywords:frequency", {"keyword": " "}, "keyword = ' ' is not allowed: a text that is not empty"),
    (
        "keywords:frequency",
        {"word": "a"},
        "word = 'a' is not allowed: its arguments are keyword, frequency, relation",
    ),
    ("keywords:existence", {"keywords": []}, "keywords = [] is not allowed: a list of at least one text"),
    ("keywords:existence", {"keywords": ["a", 1]}, "none of them empty"),
    ("keywords:letter_frequency", {"letter": "ab"}, "letter = 'ab' is not allowed: one character"),
    ("language:response_language", {"language": "xx"}, "language = 'xx' is not allowed: one of af, ar"),
    (
        "length_constraints:nth_paragraph_first_word",
        {"nth_paragraph": 3},
        "nth_paragraph = 3 is not allowed: at most",
    ),
    (
        "length_constraints:nth_paragraph_first_word",
        {"first_word": "a b"},
        "first_word = 'a b' is not allowed: one",
    ),
    ("punctuation:no_comma", {"n": 1}, "n = 1 is not allowed: its arguments are none"),
]


@pytest.mark.parametrize(("name", "change", "message"), ARGUMENT_FAULTS)
def test_a_wrong_argument_is_named_with_its_value_and_limit(name, change, message):
    with pytest.raises(InvalidRequest) as caught:
        instruction(name, {**EXAMPLES[name][0], **change}, "instructions[4]")
    assert caught.value.reason is Reason.INVALID_FIELD
    assert f"instructions[4] {name}: " in caught.value.message
    assert message in caught.value.message


def test_counts_may_come_as_the_decimals_that_tables_make_of_them():
    name = "length_constraints:number_words"
    whole, decimal = (
        instruction(name, {"num_words": count, "relation": "at least"}, "x") for count in (3, 3.0)
    )
    assert whole == decimal


def test_an_unknown_instruction_is_named():
    with pytest.raises(
        InvalidRequest, match=r"instructions\[0\] name = 'no:such' is not allowed: one of keywords:"
    ):
        instruction("no:such", {}, "instructions[0]")


def test_keywords_are_texts_not_patterns():
    assert not instruction("keywords:existence", {"keywords": ["a.b"]}, "x").is_followed("axb")
    assert not instruction("keywords:forbidden_words", {"forbidden_words": ["c++"]}, "x").is_followed(
        "I like C++ much"
    )


def question(*instructions):
    listed = [{"name": name, "arguments": arguments} for name, arguments in instructions]
    return Question(id="ifeval/1", task="ifeval", prompt="p", facts={"instructions": listed})


def test_an_answer_is_right_when_all_instructions_are_followed_and_else_the_note_names_the_first_that_is_not():
    both = question(("punctuation:no_comma", {}), ("detectable_format:title", {}), ("startend:quotation", {}))
    right = verify(both, Answer('"<<T>>"', is_complete=True))
    assert (right.score, right.note) == (1.0, "")
    assert all(right.parts.values())
    wrong = verify(both, Answer("<no title>", is_complete=True))
    assert (wrong.score, wrong.note) == (0.0, "detectable_format:title is not followed")
    assert list(wrong.parts.values()) == [True, False, False]
    assert list(wrong.parts) == ["punctuation:no_comma", "detectable_format:title", "startend:quotation"]


def test_two_instructions_of_one_kind_are_told_apart():
    words = "length_constraints:number_words"
    between = question(
        (words, {"num_words": 2, "relation": "at least"}), (words, {"num_words": 4, "relation": "less than"})
    )
    assert verify(between, Answer("one", is_complete=True)).parts == {words: False, f"{words} #2": True}
    assert part_names([]) == []


def test_an_empty_answer_says_so():
    verdict = verify(question(("punctuation:no_comma", {})), Answer(" ", is_complete=True))
    assert (verdict.score, verdict.note) == (0.0, "empty answer: punctuation:no_comma is not followed")


def test_loosely_an_introduction_a_farewell_and_emphasis_do_no_harm():
    json_only = question(("detectable_format:json_format", {}))
    wrapped = Answer('Sure, here you are:\n{"a": 1}\nI hope this helps!', is_complete=True)
    assert not verify(json_only, wrapped).is_right
    assert verify_loosely(json_only, wrapped).is_right
    quoted = question(("startend:quotation", {}))
    assert verify_loosely(quoted, Answer('**"a"**', is_complete=True)).is_right
    assert not verify_loosely(quoted, Answer("**a**", is_complete=True)).is_right


def test_there_are_eight_variants_of_an_answer():
    assert list(variants("a*\nb\nc")) == ["a*\nb\nc", "a\nb\nc", "b\nc", "b\nc", "a*\nb", "a\nb", "b", "b"]


@pytest.mark.parametrize(
    "facts", [{}, {"instructions": []}, {"instructions": ["x"]}, {"instructions": [{"name": []}]}]
)
def test_a_question_without_readable_instructions_is_refused(facts):
    broken = Question(id="q", task="ifeval", prompt="p", facts=facts)
    with pytest.raises(InvalidRequest, match="instructions"):
        verify(broken, Answer("a", is_complete=True))


def test_the_languages_are_those_that_langdetect_knows():
    import langdetect

    assert set(langdetect.detector_factory.os.listdir(langdetect.PROFILES_DIRECTORY)) == set(LANGUAGES)


def test_the_same_text_has_the_same_language_every_time():
    unclear = "radio hotel"  # without a seed it is Portuguese, Italian or Spanish
    assert len({language_of(unclear) for _ in range(20)}) == 1


def test_without_langdetect_the_error_names_the_extra_when_rows_are_read_and_when_answers_are_judged(
    tmp_path,
):
    """In a process of its own, in which langdetect cannot be imported."""
    row = {"key": 1, "prompt": "p", "instruction_id_list": ["change_case:english_lowercase"], "kwargs": [{}]}
    (tmp_path / "data.jsonl").write_text(json.dumps(row))
    program = """
import sys
from pathlib import Path

sys.modules["langdetect"] = None
from evaluation.tasks.ifeval import ifeval_questions
from evaluation.verifiers.instructions.registry import instruction
from fusionroute.errors import InvalidRequest

assert instruction("punctuation:no_comma", {}, "x").is_followed("a")
german = instruction("language:response_language", {"language": "de"}, "x")
for attempt in (lambda: german.is_followed("a"), lambda: list(ifeval_questions(Path(sys.argv[1])))):
    try:
        attempt()
    except InvalidRequest as error:
        print(error)
"""
    data = str(tmp_path / "data.jsonl")
    ended = subprocess.run([sys.executable, "-c", program, data], capture_output=True, text=True, timeout=60)
    assert ended.stdout.count("pip install 'fusionroute[evaluation]'") == 2, ended.stderr


def test_facts_travel_as_json():
    there_and_back = json.loads(json.dumps(question(("keywords:existence", {"keywords": ["a"]})).facts))
    again = Question(id="q", task="ifeval", prompt="p", facts=there_and_back)
    assert verify(again, Answer("a", is_complete=True)).is_right


TOGETHER = [
    ["detectable_format:title", "punctuation:no_comma", "startend:quotation"],
    [
        "detectable_format:number_bullet_lists",
        "change_case:english_lowercase",
        "detectable_content:postscript",
    ],
    ["length_constraints:number_words", "keywords:existence", "length_constraints:number_paragraphs"],
    ["combination:repeat_prompt", "detectable_content:number_placeholders", "startend:end_checker"],
]


@pytest.mark.parametrize("names", [[name] for name in KINDS] + TOGETHER, ids="+".join)
def test_an_answer_built_to_follow_instructions_is_right_until_one_of_them_is_spoiled(names):
    asked = question(*((name, EXAMPLES[name][0]) for name in names))
    text = follow(asked)
    assert verify(asked, Answer(text, is_complete=True)).is_right
    for name in names:
        spoiled = verify(asked, Answer(SPOILERS[name](text, EXAMPLES[name][0]), is_complete=True))
        assert not spoiled.parts[name]
