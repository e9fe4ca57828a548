"""IFEval's file as questions, and what is said about a row that cannot be one."""

from __future__ import annotations

import gzip
import json

import pytest

from evaluation.questions import digest_of
from evaluation.tasks.ifeval import ifeval_questions
from fusionroute.errors import InvalidRequest, Reason

GOOD = {
    "key": 7,
    "prompt": "Name two rivers, in a list.",
    "instruction_id_list": ["detectable_format:number_bullet_lists", "punctuation:no_comma"],
    "kwargs": [{"num_bullets": 2, "relation": None}, {}],
    "remark": "other fields are passed over",
}


def write(folder, *rows, name="data.jsonl"):
    path = folder / name
    text = "".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows)
    path.write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
    return path


def test_a_row_becomes_a_question_with_its_instructions(tmp_path):
    (question,) = ifeval_questions(write(tmp_path, GOOD), max_tokens=50)
    assert question.id == question.cluster == "ifeval/7"
    assert question.prompt == ({"role": "user", "content": "Name two rivers, in a list."},)
    assert question.facts == {
        "instructions": [
            {"name": "detectable_format:number_bullet_lists", "arguments": {"num_bullets": 2}},
            {"name": "punctuation:no_comma", "arguments": {}},
        ]
    }
    assert question.strata == {"instructions": "2"}
    assert question.max_tokens == 50


def test_a_gzipped_file_and_blank_lines_give_the_same_questions(tmp_path):
    plain = ifeval_questions(write(tmp_path, GOOD))
    gzipped = ifeval_questions(write(tmp_path, "", GOOD, "  ", name="data.jsonl.gz"))
    assert digest_of(plain) == digest_of(gzipped)


FAULTS = [
    ({"key": None}, "key = None is not allowed: a whole number"),
    ({"key": True}, "key = True is not allowed"),
    ({"prompt": " "}, "prompt = ' ' is not allowed: a text that is not empty"),
    ({"instruction_id_list": []}, "instruction_id_list = [] is not allowed: a list of at least one name"),
    (
        {"instruction_id_list": ["keywords:exist", "punctuation:no_comma"]},
        "instructions[0] name = 'keywords:exist'",
    ),
    ({"kwargs": [{"num_bullets": 2}]}, "a list of 2 objects, one for each instruction"),
    ({"kwargs": [{"num_bullets": 2}, None]}, "kwargs[1] = None is not allowed: an object"),
    (
        {"kwargs": [{"num_bullets": -1}, {}]},
        "instructions[0] detectable_format:number_bullet_lists: num_bullets = -1 is not allowed: a whole number",
    ),
    (
        {"kwargs": [{"num_bullets": 2, "colour": "red"}, {}]},
        "detectable_format:number_bullet_lists: colour = 'red' is not allowed: its arguments are num_bullets",
    ),
]


@pytest.mark.parametrize(("change", "message"), FAULTS)
def test_a_bad_row_is_named_with_file_line_field_value_and_limit(tmp_path, change, message):
    path = write(tmp_path, GOOD, {**GOOD, "key": 8, **change})
    with pytest.raises(InvalidRequest) as caught:
        list(ifeval_questions(path))
    assert caught.value.reason is Reason.DATA_INVALID
    assert caught.value.message.startswith(f"{path}: line 2: ")
    assert message in caught.value.message


@pytest.mark.parametrize(
    ("line", "message"),
    [("{", "not JSON"), ("[1]", "is not a JSON object"), ("[" * 100_000, "too deeply nested")],
)
def test_a_line_that_is_no_object_is_named(tmp_path, line, message):
    with pytest.raises(InvalidRequest, match=f"data.jsonl: line 3: .*{message}"):
        list(ifeval_questions(write(tmp_path, GOOD, "", line)))


def test_a_key_that_occurs_twice_is_named_with_its_first_line(tmp_path):
    with pytest.raises(InvalidRequest, match="line 2: key = 7 is not allowed: line 1 has it already"):
        list(ifeval_questions(write(tmp_path, GOOD, GOOD)))


def test_a_file_that_breaks_off_is_named_with_its_line(tmp_path):
    path = write(tmp_path, *(dict(GOOD, key=key) for key in range(300)), name="data.jsonl.gz")
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(InvalidRequest, match=r"data.jsonl.gz: line \d+: the file cannot be read on"):
        list(ifeval_questions(path))


@pytest.mark.parametrize("name", ["absent.jsonl", "data.csv"])
def test_a_file_that_is_not_there_or_of_another_kind_is_named(tmp_path, name):
    with pytest.raises(InvalidRequest, match="path = ") as caught:
        list(ifeval_questions(tmp_path / name))
    assert caught.value.reason is Reason.INVALID_FIELD
