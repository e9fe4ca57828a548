"""Rows of training data for tests: written to files, loaded with the tokenizer of numbered words, looked at."""

from __future__ import annotations

import json

import pytest

from fusionroute.errors import InvalidRequest, Reason
from tests.tiny_models import word_tokenizer
from trainer.config import DataTable
from trainer.rows import Row, RowSet

CHATML = (
    "{% for m in messages %}[{{ m.role }}] {{ m.content }} <eos>\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)
EOS = 1


def tokenizer(chat_template: str | None = CHATML):
    made = word_tokenizer()
    made.chat_template = chat_template
    return made


def user(content: str) -> dict[str, str]:
    return {"role": "user", "content": content}


def assistant(content: str) -> dict[str, str]:
    return {"role": "assistant", "content": content}


def table(folder, *rows: object, name: str = "rows.jsonl", **changes) -> DataTable:
    text = "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)
    (folder / name).write_text(text)
    return DataTable(files=(folder / name,), **changes)


def each(rows: RowSet) -> list[Row]:
    return [rows[index] for index in range(len(rows))]


def learnt(rows, index: int = 0) -> list[int]:
    row = rows[index]
    return row.ids[row.supervised].tolist()


def refusal(load, *arguments) -> str:
    with pytest.raises(InvalidRequest) as caught:
        load(*arguments)
    assert caught.value.reason is Reason.DATA_INVALID
    return caught.value.message
