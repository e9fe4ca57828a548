"""Rows of every format are understood, and bad ones are named by file, line and field."""

from __future__ import annotations

import gzip
import json

import pyarrow  # type: ignore[import-untyped]
import pytest
from pyarrow import parquet

from fusionroute.errors import InvalidRequest, Reason
from tests.data_rows import EOS, assistant, learnt, refusal, table, tokenizer, user
from trainer.config import DataTable
from trainer.data import load_pairs, load_prompts, load_texts, validate


def test_of_a_text_every_token_is_learnt_but_the_first(tmp_path):
    rows = load_texts(table(tmp_path, {"text": "w5 w6 w7"}), tokenizer())
    assert rows[0].ids.tolist() == [5, 6, 7, EOS]
    assert learnt(rows) == [6, 7, EOS]


def test_of_a_completion_all_is_learnt_and_of_its_prompt_nothing(tmp_path):
    rows = load_texts(table(tmp_path, {"prompt": "w5 w6", "completion": " w7 w8"}), tokenizer())
    assert rows[0].ids.tolist() == [5, 6, 7, 8, EOS]
    assert learnt(rows) == [7, 8, EOS]


def test_eos_is_learnt_also_where_it_is_the_padding(tmp_path):
    own = tokenizer()
    own.pad_token = own.eos_token
    assert learnt(load_texts(table(tmp_path, {"prompt": "w5", "completion": " w7"}), own)) == [7, EOS]


def test_no_eos_is_appended_where_the_configuration_says_so(tmp_path):
    rows = load_texts(table(tmp_path, {"prompt": "w5", "completion": " w7"}, end_of_text=False), tokenizer())
    assert learnt(rows) == [7]


def test_an_eos_that_the_text_bears_is_not_doubled(tmp_path):
    rows = load_texts(table(tmp_path, {"prompt": "w5", "completion": " w7 <eos>"}), tokenizer())
    assert learnt(rows) == [7, EOS]


def test_a_completion_that_was_cut_off_teaches_no_end(tmp_path):
    row = {"prompt": "w5", "chosen": " w7", "rejected": " w8 w9", "rejected_ended": False}
    rows = load_pairs(table(tmp_path, row), tokenizer()).rows
    assert learnt(rows, 0) == [7, EOS]
    assert learnt(rows, 1) == [8, 9]


def test_an_assistants_message_that_was_cut_off_teaches_no_end_either(tmp_path):
    row = {
        "prompt": [user("w5")],
        "chosen": [assistant("w7")],
        "rejected": [assistant("w8 w9")],
        "rejected_ended": False,
    }
    rows = load_pairs(table(tmp_path, row), tokenizer()).rows
    assert learnt(rows, 0) == [7, EOS]
    assert learnt(rows, 1) == [8, 9]


@pytest.mark.parametrize("field", ["messages", "conversations"])
def test_of_a_conversation_only_the_assistants_turns_are_learnt(tmp_path, field):
    rows = load_texts(
        table(tmp_path, {field: [user("w5"), assistant("w6 w7"), user("w8"), assistant("w9")]}), tokenizer()
    )
    assert learnt(rows) == [6, 7, EOS, 9, EOS]
    assert rows[0].ids.tolist()[-1] == EOS


def test_names_of_other_data_sets_for_roles_are_understood(tmp_path):
    conversation = [{"from": "human", "value": "w5"}, {"from": "gpt", "value": "w6"}]
    assert learnt(load_texts(table(tmp_path, {"conversations": conversation}), tokenizer())) == [6, EOS]


def test_of_a_prompt_of_messages_no_turn_is_learnt(tmp_path):
    row = {"prompt": [user("w5"), assistant("w6"), user("w7")], "completion": [assistant("w8")]}
    assert learnt(load_texts(table(tmp_path, row), tokenizer())) == [8, EOS]


def test_an_empty_answer_within_a_prompt_does_no_harm(tmp_path):
    row = {"prompt": [user("w5"), assistant(""), user("w7")], "completion": [assistant("w8")]}
    assert learnt(load_texts(table(tmp_path, row), tokenizer())) == [8, EOS]


def test_messages_behind_the_assistants_last_one_are_left_out(tmp_path):
    rows = load_texts(table(tmp_path, {"messages": [user("w5"), assistant("w6"), user("w7")]}), tokenizer())
    assert 7 not in rows[0].ids and learnt(rows) == [6, EOS]


def test_both_rows_of_a_pair_begin_with_the_same_prompt(tmp_path):
    row = {"prompt": "w5 w6", "chosen": " w7", "rejected": " w8 w9"}
    pairs = load_pairs(table(tmp_path, row), tokenizer())
    assert len(pairs) == 1 and len(pairs.rows) == 2
    assert pairs.rows[0].ids.tolist() == [5, 6, 7, EOS]
    assert pairs.rows[1].ids.tolist() == [5, 6, 8, 9, EOS]


def test_what_two_conversations_begin_with_is_their_prompt(tmp_path):
    shared = [user("w5"), assistant("w6"), user("w7")]
    explicit = {"prompt": shared, "chosen": [assistant("w8")], "rejected": [assistant("w9")]}
    implicit = {"chosen": [*shared, assistant("w8")], "rejected": [*shared, assistant("w9")]}
    repeated = {**implicit, "prompt": "w7"}
    sets = [
        load_pairs(table(tmp_path, row, name=f"{index}.jsonl"), tokenizer()).rows
        for index, row in enumerate((explicit, implicit, repeated))
    ]
    assert sets[0].digest == sets[1].digest == sets[2].digest
    assert learnt(sets[1], 0) == [8, EOS] and learnt(sets[1], 1) == [9, EOS]


def test_an_answer_that_two_conversations_share_is_no_part_of_their_prompt_when_it_ends_one(tmp_path):
    short = [user("w5"), assistant("w6")]
    row = {"chosen": short, "rejected": [*short, user("w7"), assistant("w8")]}
    rows = load_pairs(table(tmp_path, row), tokenizer()).rows
    assert learnt(rows, 0) == [6, EOS]
    assert learnt(rows, 1) == [6, EOS, 8, EOS]


def test_prompts_come_with_their_gold_answers_from_every_format_that_has_some(tmp_path):
    data = table(
        tmp_path,
        {"prompt": "w5 w6", "completion": " w7"},
        {"prompt": "w5", "chosen": " w8", "rejected": " w9"},
        {"messages": [user("w5"), assistant("w6")]},
    )
    plain, pair, chat = load_prompts(data, tokenizer())
    assert (plain.prompt, plain.prompt_ids, plain.gold) == ("w5 w6", (5, 6), " w7")
    assert pair.gold == " w8"
    assert chat.prompt == (user("w5"),) and chat.gold == "w6"
    assert plain.origin.endswith("rows.jsonl: line 1")


def test_gzip_and_parquet_hold_the_same_rows_as_plain_lines(tmp_path):
    rows = [{"messages": [user("w5"), assistant(f"w{index}")]} for index in range(6, 20)]
    plain = table(tmp_path, *rows)
    with gzip.open(tmp_path / "rows.jsonl.gz", "wt") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    digests = {
        load_texts(DataTable(files=(path,)), tokenizer()).digest
        for path in (*plain.files, tmp_path / "rows.jsonl.gz", tmp_path / "rows.parquet")
    }
    assert len(digests) == 1


def test_a_data_set_of_a_hub_is_read_by_its_split(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "hub").mkdir()
    (tmp_path / "hub" / "train.jsonl").write_text('{"text": "w5 w6"}\n{"text": "w7 w8"}\n')
    (tmp_path / "hub" / "test.jsonl").write_text('{"text": "w9 w10"}\n')
    hub = str(tmp_path / "hub")
    assert len(load_texts(DataTable(dataset=hub), tokenizer())) == 2
    assert learnt(load_texts(DataTable(dataset=hub, split="test"), tokenizer())) == [10, EOS]
    assert "dev" in refusal(load_texts, DataTable(dataset=hub, split="dev"), tokenizer())


def test_no_more_rows_are_read_than_asked_for_over_all_files(tmp_path):
    first = table(tmp_path, {"text": "w5 w6"}, {"text": "w5 w7"}, name="a.jsonl")
    second = table(tmp_path, {"text": "w5 w8"}, "not JSON", name="b.jsonl")
    data = DataTable(files=(*first.files, *second.files), max_rows=3)
    assert len(load_texts(data, tokenizer())) == 3


BAD_TEXTS = {
    "not JSON: Expecting value": '{"text": }',
    "is not a JSON object": "[1, 2]",
    "none of messages, prompt + completion, text; it has ['question']": {"question": "w5"},
    "a row of pairs": {"chosen": "w5", "rejected": "w6"},
    "completion: missing": {"prompt": "w5"},
    "prompt: missing": {"completion": "w5"},
    "text: 7 is not text": {"text": 7},
    "text: '  ' is empty": {"text": "  "},
    "completion: '' is empty": {"prompt": "w5", "completion": ""},
    "both be strings or both be lists": {"prompt": "w5", "completion": [assistant("w6")]},
    "messages: 'w5' is not a list of messages": {"messages": "w5"},
    "messages: an empty list": {"messages": []},
    "messages[1].role: 'bot' is not one of system, user, assistant": {
        "messages": [user("w5"), {"role": "bot", "content": "w6"}]
    },
    "messages[0].role: missing": {"messages": [{"content": "w5"}]},
    "messages[1].content: missing": {"messages": [user("w5"), {"role": "assistant", "content": None}]},
    "messages[1].content: '' is empty": {"messages": [user("w5"), assistant("")]},
    "messages: no message of the assistant": {"messages": [user("w5")]},
    "cannot begin a conversation": {"messages": [assistant("w5"), user("w6"), assistant("w7")]},
    "'assistant' cannot end a prompt": {
        "prompt": [user("w5"), assistant("w6")],
        "completion": [assistant("w7")],
    },
    "completion: must begin and end with a message of the assistant": {
        "prompt": [user("w5")],
        "completion": [user("w7")],
    },
    "half of a surrogate pair": '{"text": "w5 \\ud800"}',
    "no token to learn": {"text": "w5 <eos>", "completion_ended": True} | {"text": "<eos>"},
}


@pytest.mark.parametrize("words", BAD_TEXTS)
def test_a_bad_text_is_named_by_file_line_and_fault(tmp_path, words):
    data = table(tmp_path, {"text": "w5 w6"}, BAD_TEXTS[words])
    message = refusal(load_texts, data, tokenizer())
    assert message.startswith(f"{data.files[0]}: line 2: ") and words in message


SHARED = [user("w5"), assistant("w6")]
BAD_PAIRS = {
    "rejected: missing": {"prompt": "w5", "chosen": "w6"},
    "prompt: missing; only lists of messages": {"chosen": "w5", "rejected": "w6"},
    "rejected: equal to `chosen`": {"prompt": "w5", "chosen": "w6", "rejected": "w6"},
    "equal to `chosen`: nothing": {"chosen": SHARED, "rejected": SHARED},
    "the same tokens as `chosen`": {"prompt": "w5", "chosen": "w6", "rejected": "w6  "},
    "share no message": {"chosen": SHARED, "rejected": [user("w7"), assistant("w6")]},
    "is none of the messages": {"prompt": "w9", "chosen": SHARED, "rejected": [user("w5"), assistant("w8")]},
    "must both be strings or both be lists": {"prompt": "w5", "chosen": "w6", "rejected": [assistant("w7")]},
    "rejected[1].content: ' ' is empty": {"chosen": SHARED, "rejected": [user("w5"), assistant(" ")]},
    "rejected_ended: 'no' is neither true nor false": {
        "prompt": "w5",
        "chosen": "w6",
        "rejected": "w7",
        "rejected_ended": "no",
    },
}


@pytest.mark.parametrize("words", BAD_PAIRS)
def test_a_bad_pair_is_named_by_file_line_and_fault(tmp_path, words):
    data = table(tmp_path, {"prompt": "w5", "chosen": "w6", "rejected": "w7"}, BAD_PAIRS[words])
    message = refusal(load_pairs, data, tokenizer())
    assert message.startswith(f"{data.files[0]}: line 2: ") and words in message


def test_a_text_is_no_prompt(tmp_path):
    assert "a text has no prompt" in refusal(load_prompts, table(tmp_path, {"text": "w5"}), tokenizer())


def test_bytes_that_are_no_text_are_named_by_their_place(tmp_path):
    (tmp_path / "rows.jsonl").write_bytes(b'{"text": "w5 w6"}\n{"text": "\xff"}\n')
    message = refusal(load_texts, DataTable(files=(tmp_path / "rows.jsonl",)), tokenizer())
    assert "line 2: not UTF-8: byte 10 of the line is 0xff" in message


def test_a_file_that_breaks_off_is_named_by_the_line_before(tmp_path):
    whole = gzip.compress(b'{"text": "w5 w6 w7 w8"}\n' * 5000)
    (tmp_path / "rows.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    message = refusal(load_texts, DataTable(files=(tmp_path / "rows.jsonl.gz",)), tokenizer())
    assert "the file cannot be read on" in message


def test_a_parquet_file_that_is_none_is_named(tmp_path):
    (tmp_path / "rows.parquet").write_text("w5")
    message = refusal(load_texts, DataTable(files=(tmp_path / "rows.parquet",)), tokenizer())
    assert "rows.parquet: row 1: the file cannot be read on" in message


@pytest.mark.parametrize("name", ["missing.jsonl", "rows.csv"])
def test_a_file_that_is_missing_or_of_another_kind_is_refused_before_any_row(tmp_path, name):
    good = table(tmp_path, "not JSON")
    with pytest.raises(InvalidRequest, match=name) as caught:
        load_texts(DataTable(files=(*good.files, tmp_path / name)), tokenizer())
    assert caught.value.reason is Reason.INVALID_FIELD


def test_a_data_set_without_rows_is_refused(tmp_path):
    assert "no row is left to train on: there are none" in refusal(load_texts, table(tmp_path), tokenizer())


def test_validation_finds_every_problem_and_loading_only_the_first(tmp_path):
    data = table(tmp_path, {"text": 1}, {"text": "w5 w6"}, "nonsense", {"text": ""}, {"text": "w7 w8"})
    report = validate(data, tokenizer(), "texts", max_problems=2)
    assert (report.num_rows, report.num_kept, report.num_problems) == (5, 2, 3)
    assert [problem.origin.number for problem in report.problems] == [1, 3]
    assert not report.is_valid
    assert "... and 1 further problems" in report.lines()
    assert "line 1" in refusal(load_texts, data, tokenizer())


def test_validation_counts_what_loading_would_load_and_shows_it(tmp_path):
    data = table(
        tmp_path,
        {"prompt": "w5", "completion": " w6"},
        {"prompt": "w5", "completion": " w6 w7 w8 w9"},
        {"prompt": "w5 w6 w7 w8", "completion": " w9"},
        max_tokens=4,
    )
    report, rows = validate(data, tokenizer(), "texts"), load_texts(data, tokenizer())
    assert report.is_valid
    assert (report.num_kept, report.num_cut, dict(report.left_out)) == (2, 1, {"prompt too long": 1})
    assert (report.num_tokens, report.num_targets) == (len(rows.ids), rows.num_targets)
    assert (report.token_lengths["shortest"], report.token_lengths["longest"]) == (3, 6)
    assert report.truncated_share == 0.5
    assert report.examples[0].replace(" ", "") == "w5⟦w6<eos>⟧"


def test_validation_looks_at_prompts_too(tmp_path):
    report = validate(
        table(tmp_path, {"prompt": "w5 w6", "completion": " w7"}, {"text": "w5"}), tokenizer(), "prompts"
    )
    assert (report.num_kept, report.num_problems, report.token_lengths["longest"]) == (1, 1, 2)
