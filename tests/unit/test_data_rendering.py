"""What is trained is what is served: prompts, ends and cuts of rendered rows."""

from __future__ import annotations

import json
import random
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.processors import TemplateProcessing
from transformers import GenerationConfig, PreTrainedTokenizerFast

from fusionroute.errors import InvalidRequest, Reason
from fusionroute.v1.router_pb2 import ChatMessage, ChatMessages, GenerateRequest
from router_service.turn_request import Offer, read_prompt
from tests.data_rows import (
    CHATML,
    EOS,
    assistant,
    each,
    learnt,
    refusal,
    table,
    tokenizer,
    user,
)
from trainer.config import DataTable
from trainer.data import load_pairs, load_prompts, load_texts, validate
from trainer.rows import RowSet

TEMPLATES = {
    "ends of turns and newlines": "{% for m in messages %}<s>{{ m.role }}\n{{ m.content }}<e>\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}",
    "the prompt's end invites the answer": "{% for m in messages %}{% if m.role == 'assistant' %} {{ m.content }}<e>"
    "{% else %}<s>[{{ m.content }}]{% endif %}{% endfor %}",
    "contents are trimmed": "{% for m in messages %}<s>{{ m.role }}: {{ m.content | trim }}<e>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant: {% endif %}",
    "only the whole conversation ends": "{% for m in messages %}<s>{{ m.role }}\n{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% else %}<e>{% endif %}",
}


def byte_tokenizer(*, begins: bool = False) -> PreTrainedTokenizerFast:
    """Bytes with merges across what a prompt and its answer may have at their border."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("Ċ", "Ċ"), ("Ġ", "Ġ"), ("a", "b"), ("ab", "c"), ("Ġ", "a"), (":", "Ġ")]
    words = [*letters, *dict.fromkeys("".join(merge) for merge in merges), "<s>", "<e>", "<b>"]
    ids = {word: index for index, word in enumerate(words)}
    made = Tokenizer(BPE(ids, merges))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(["<s>", "<e>", "<b>"])
    if begins:
        made.post_processor = TemplateProcessing(single="<b> $A", special_tokens=[("<b>", ids["<b>"])])
    return PreTrainedTokenizerFast(
        tokenizer_object=made, eos_token="<e>", pad_token="<e>", clean_up_tokenization_spaces=False
    )


def random_text(dice: random.Random) -> str:
    return "".join(dice.choice("ab c\n:") for _ in range(dice.randint(1, 9))) + dice.choice("abc")


async def served(own: PreTrainedTokenizerFast, prompt: Any) -> list[int]:
    """The prompt's ids as the router service makes them."""
    request = GenerateRequest(text=prompt) if isinstance(prompt, str) else None
    if request is None:
        request = GenerateRequest(messages=ChatMessages(messages=[ChatMessage(**m) for m in prompt]))
    offer = Offer((), (), None, len(own), 4096, "")
    return await read_prompt(request, own, offer, first_turn=True)


@pytest.mark.parametrize("begins", [False, True])
async def test_rows_begin_with_the_very_tokens_that_a_served_prompt_has(tmp_path, begins):
    own = byte_tokenizer(begins=begins)
    dice = random.Random(1)
    content = [{"prompt": random_text(dice), "completion": random_text(dice)} for _ in range(60)]
    content += [{"prompt": "ab\n", "completion": "\nc"}, {"prompt": "a ", "completion": " ab"}]
    data = table(tmp_path, *content)
    rows = load_texts(data, own)
    for row, text, prompt in zip(each(rows), content, load_prompts(data, own), strict=True):
        expected = await served(own, text["prompt"])
        assert row.ids[: len(expected)].tolist() == expected == list(prompt.prompt_ids)
        assert row.supervised.tolist() == [False] * len(expected) + [True] * (len(row.ids) - len(expected))
        assert own.decode(row.ids[len(expected) :]) == text["completion"] + "<e>"


@pytest.mark.parametrize("name", TEMPLATES)
async def test_a_conversations_targets_are_what_a_served_model_would_have_to_write(tmp_path, name):
    own = byte_tokenizer()
    own.chat_template = TEMPLATES[name]
    dice = random.Random(2)
    content = [
        {"prompt": [user(random_text(dice))], "completion": [assistant(random_text(dice))]} for _ in range(40)
    ]
    rows = load_texts(table(tmp_path, *content), own)
    for row, text in zip(each(rows), content, strict=True):
        expected = await served(own, text["prompt"])
        assert row.ids[: len(expected)].tolist() == expected
        written = own.decode(row.ids[row.supervised])
        assert row.supervised[len(expected) :].all() and not row.supervised[: len(expected)].any()
        assert written.endswith("<e>") and written.count("<e>") == 1
        assert written.removesuffix("<e>").strip() == text["completion"][0]["content"].strip()


@pytest.mark.parametrize("name", TEMPLATES)
def test_of_several_turns_each_answer_is_learnt_and_nothing_else(tmp_path, name):
    own = byte_tokenizer()
    own.chat_template = TEMPLATES[name]
    messages = [user("a"), assistant("bb"), user("c"), assistant("cc b")]
    rows = load_texts(table(tmp_path, {"messages": messages}), own)
    spans = own.decode(learnt(rows)).replace("\n", " ").replace("<e>", " ").split()
    assert spans == ["bb", "cc", "b"]


def test_blanks_behind_the_end_of_a_turn_are_never_learnt(tmp_path):
    rows = load_texts(table(tmp_path, {"messages": [user("w5"), assistant("w6")]}), tokenizer())
    own = byte_tokenizer()
    own.chat_template = TEMPLATES["ends of turns and newlines"]
    rows = load_texts(
        table(tmp_path, {"messages": [user("a"), assistant("b"), user("c"), assistant("a")]}), own
    )
    assert own.decode(learnt(rows)) == "b<e>a<e>"
    assert own.decode(rows[0].ids).endswith("a<e>")


def test_a_template_that_ends_turns_with_another_end_token_gets_no_eos(tmp_path):
    own = byte_tokenizer()
    own.chat_template = TEMPLATES["ends of turns and newlines"].replace("<e>", "<b>")
    data = table(tmp_path, {"messages": [user("a"), assistant("b")]})
    assert own.decode(learnt(load_texts(data, own))) == "b<b>\n<e>"
    other_end = own.convert_tokens_to_ids("<b>")
    assert own.decode(learnt(load_texts(data, own, end_ids=[own.eos_token_id, other_end]))) == "b<b>"


def test_further_end_tokens_are_found_beside_the_tokenizer(tmp_path):
    own = byte_tokenizer()
    own.chat_template = TEMPLATES["ends of turns and newlines"].replace("<e>", "<b>")
    own.save_pretrained(tmp_path / "model")
    both = [own.eos_token_id, own.convert_tokens_to_ids("<b>")]
    GenerationConfig(eos_token_id=both).save_pretrained(tmp_path / "model")
    loaded = PreTrainedTokenizerFast.from_pretrained(tmp_path / "model")
    data = table(tmp_path, {"messages": [user("a"), assistant("b")]})
    assert loaded.decode(learnt(load_texts(data, loaded))) == "b<b>"


FAULTY_TEMPLATES = {
    "the chat template has no generation prompt": "{% for m in messages %}[{{ m.role }}] {{ m.content }} {% endfor %}",
    "writes the prompt differently once it is answered": CHATML.replace(
        "[assistant] {%", "[assistant] <think> {%"
    ),
    "writes this answer differently once the conversation goes on": "{% for m in messages %}"
    "{% if m.role == 'assistant' and loop.last %}w9 {% endif %}{{ m.content }} {% endfor %}",
    "does not write it": "{% for m in messages %}[{{ m.role }}] {% if m.role == 'user' %}{{ m.content }} {% endif %}"
    "{% endfor %}{% if add_generation_prompt %}[assistant] {% endif %}",
    "the chat template refuses it: TemplateError: no": "{{ raise_exception('no') }}",
}


@pytest.mark.parametrize("words", FAULTY_TEMPLATES)
def test_a_template_that_cannot_be_masked_is_refused_with_its_fault(tmp_path, words):
    data = table(tmp_path, {"messages": [user("w5"), assistant("w6"), user("w7"), assistant("w8")]})
    message = refusal(load_texts, data, tokenizer(FAULTY_TEMPLATES[words]))
    assert message.startswith(f"{data.files[0]}: line 1: messages") and words in message


def test_messages_without_any_template_are_refused_at_once(tmp_path):
    data = table(tmp_path, {"messages": [user("w5"), assistant("w6")]})
    for look in (load_texts, partial(validate, kind="texts")):
        assert "the tokenizer has no chat template" in refusal(look, data, tokenizer(None))


def test_a_template_from_a_file_replaces_that_of_the_tokenizer(tmp_path):
    (tmp_path / "template.jinja").write_text(CHATML)
    rows = {"messages": [user("w5"), assistant("w6")]}
    own = load_texts(table(tmp_path, rows), tokenizer())
    data = table(tmp_path, rows, chat_template=tmp_path / "template.jinja")
    assert load_texts(data, tokenizer(None)).digest == own.digest
    with pytest.raises(InvalidRequest, match=r"chat_template = .*gone.jinja cannot be read"):
        load_texts(table(tmp_path, rows, chat_template=tmp_path / "gone.jinja"), tokenizer())


def test_a_long_completion_is_cut_at_the_right_and_teaches_no_end(tmp_path):
    rows = load_texts(
        table(tmp_path, {"prompt": "w5 w6", "completion": " w7 w8 w9"}, max_tokens=4), tokenizer()
    )
    assert rows[0].ids.tolist() == [5, 6, 7, 8]
    assert learnt(rows) == [7, 8]


@pytest.mark.parametrize("overlong", ["truncate", "drop", "refuse"])
def test_a_row_of_exactly_the_limit_is_whole(tmp_path, overlong):
    data = table(tmp_path, {"prompt": "w5 w6", "completion": " w7"}, max_tokens=4, overlong=overlong)
    rows = load_texts(data, tokenizer())
    assert validate(data, tokenizer(), "texts").num_cut == 0
    assert rows[0].ids.tolist() == [5, 6, 7, EOS]


def test_a_pair_is_cut_to_one_prompt_and_two_answers(tmp_path):
    row = {"prompt": "w5 w6", "chosen": " w7 w8 w9", "rejected": " w10"}
    pairs = load_pairs(table(tmp_path, row, max_tokens=4), tokenizer())
    assert pairs.rows[0].ids.tolist() == [5, 6, 7, 8]
    assert pairs.rows[1].ids.tolist() == [5, 6, 10, EOS]


def kept(tmp_path, overlong: str, *rows: dict[str, str], load=load_texts) -> RowSet:
    good = {"prompt": "w5", "completion": " w6", "chosen": " w6", "rejected": " w7"}
    if load is load_texts:
        rows = tuple({name: row[name] for name in row if name in ("prompt", "completion")} for row in rows)
        good = {"prompt": "w5", "completion": " w6"}
    loaded = load(table(tmp_path, good, *rows, max_tokens=4, overlong=overlong), tokenizer())
    return loaded if load is load_texts else loaded.rows


LONG_PROMPT = {"prompt": "w5 w6 w7 w8", "completion": " w9"}


def test_a_prompt_that_leaves_no_room_is_left_out_or_refused_but_never_cut(tmp_path):
    assert len(kept(tmp_path, "truncate", LONG_PROMPT)) == 1
    assert len(kept(tmp_path, "drop", LONG_PROMPT)) == 1
    data = table(tmp_path, LONG_PROMPT, max_tokens=4, overlong="refuse")
    assert refusal(load_texts, data, tokenizer()).endswith("line 1: 6 tokens; max_tokens = 4")


def test_long_rows_are_left_out_where_the_configuration_says_so(tmp_path):
    assert len(kept(tmp_path, "drop", {"prompt": "w5", "completion": " w6 w7 w8"})) == 1
    assert len(kept(tmp_path, "truncate", {"prompt": "w5", "completion": " w6 w7 w8"})) == 2


def test_pairs_that_are_equal_once_cut_are_left_out(tmp_path):
    row = {"prompt": "w5", "chosen": " w6 w7 w8 w9", "rejected": " w6 w7 w8 w10"}
    assert len(kept(tmp_path, "truncate", row, load=load_pairs)) == 2
    report = validate(table(tmp_path, row, max_tokens=4), tokenizer(), "pairs")
    assert dict(report.left_out) == {"chosen and rejected equal once cut": 1} and not report.is_valid


def test_when_every_row_is_too_long_the_refusal_says_so(tmp_path):
    data = table(tmp_path, LONG_PROMPT, LONG_PROMPT, max_tokens=4)
    assert refusal(load_texts, data, tokenizer()).endswith("no row is left to train on: 2 prompt too long")


def test_prompts_that_leave_no_room_for_an_answer_are_left_out(tmp_path):
    data = table(tmp_path, LONG_PROMPT, {"prompt": "w5", "completion": " w6"}, max_tokens=4)
    assert [prompt.gold for prompt in load_prompts(data, tokenizer())] == [" w6"]
    with pytest.raises(InvalidRequest, match="4 tokens leave no room in max_tokens = 4"):
        load_prompts(data.model_copy(update={"overlong": "refuse"}), tokenizer())


def test_a_tokenizer_without_eos_cannot_end_texts(tmp_path):
    own = tokenizer()
    own.eos_token = None
    with pytest.raises(InvalidRequest, match="the tokenizer has no EOS token") as caught:
        load_texts(table(tmp_path, {"text": "w5 w6"}), own)
    assert caught.value.reason is Reason.INVALID_FIELD
    assert learnt(load_texts(table(tmp_path, {"text": "w5 w6"}, end_of_text=False), own)) == [6]


def test_more_rows_than_one_batch_keep_their_order(tmp_path):
    numbers = [2 + (index * 7) % 50 for index in range(700)]
    (tmp_path / "many.jsonl").write_text("".join(json.dumps({"text": f"w3 w{n}"}) + "\n" for n in numbers))
    rows = load_texts(DataTable(files=(tmp_path / "many.jsonl",)), tokenizer())
    assert [int(rows[index].ids[1]) for index in range(700)] == numbers


def documented_rows() -> list[tuple[dict[str, Any], str]]:
    """The rows that the page shows as they are, each with its second column."""
    page = Path(__file__).resolve().parents[2] / "docs" / "training_data.md"
    cells = [line.split(" | ") for line in page.read_text().splitlines() if line.startswith("| `{")]
    return [
        (json.loads(row.strip("| `")), shown.strip("| `").partition("`")[0])
        for row, shown in cells
        if "[messages]" not in row
    ]


def test_the_rows_that_the_page_shows_load_and_look_as_it_says(tmp_path):
    own = byte_tokenizer()
    own.add_special_tokens({"additional_special_tokens": ["<user>", "<assistant>", "<eos>", "<end>"]})
    own.chat_template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}<end>{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    shown = documented_rows()
    assert [sorted(row) for row, _ in shown] == [
        ["text"], ["completion", "prompt"], ["messages"], ["chosen", "prompt", "rejected"],
    ]  # fmt: skip
    for row, expected in shown:
        own.eos_token = "<end>" if "messages" in row else "<eos>"
        kind = "pairs" if "chosen" in row else "texts"
        report = validate(table(tmp_path, row), own, kind)
        assert report.is_valid
        if kind == "texts":
            assert report.examples[0] == expected
