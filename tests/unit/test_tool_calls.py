"""Calls of tools: read from text, the same whether streamed or whole, and written as the template teaches."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from fusionroute.errors import InvalidRequest
from fusionroute.fusion import Sampling, choose
from router_service.chat import render
from router_service.constraints import Constraint, Constraints, Language
from router_service.tool_calls import ToolCall, ToolCallParser, ToolFormat, new_call_id

HERMES = """{%- if tools %}TOOLS{% for tool in tools %}{{ tool | tojson }}{% endfor %}
Call with <tool_call>{"name": ..., "arguments": ...}</tool_call>{% endif %}
{%- for m in messages %}[{{ m.role }}]{{ m.content }}{% for c in m.tool_calls or [] %}
<tool_call>{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}</tool_call>{% endfor %}
{%- endfor %}[assistant]"""
LLAMA = """{%- if tools %}{% for t in tools %}{{ t | tojson }}{% endfor %}
Respond with {"name": n, "parameters": p}{% endif %}
{%- for m in messages %}[{{ m.role }}]{{ m.content }}{% for c in m.tool_calls or [] %}
{{- '{"name": "' + c.function.name + '", "parameters": ' }}{{ c.function.arguments | tojson }}}
{%- endfor %}{% endfor %}[assistant]"""
MISTRAL = """{%- if tools %}[AVAILABLE_TOOLS]{{ tools | tojson }}{% endif %}
{%- for m in messages %}[{{ m.role }}]{{ m.content }}
{%- if m.tool_calls %}[TOOL_CALLS]{{ m.tool_calls | tojson }}{% endif %}{% endfor %}[assistant]"""
NO_TOOLS = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}[assistant]"
NO_RESULTS = """{% for m in messages %}{% if m.role not in ['system', 'user', 'assistant'] %}
{{- raise_exception('only user and assistant') }}{% endif %}{{ m.content }}{% endfor %}"""

NUMBER = {"type": "integer", "minimum": 0, "maximum": 99}
ADDING = {
    "type": "object",
    "properties": {"a": {"$ref": "#/$defs/n"}, "b": {"$ref": "#/$defs/n"}},
    "required": ["a", "b"],
    "additionalProperties": False,
    "$defs": {"n": NUMBER},
}
NOTHING = {"type": "object", "properties": {}, "additionalProperties": False}
TOOLS: list[dict[str, Any]] = [
    {"type": "function", "function": {"name": "add", "parameters": ADDING}},
    {"type": "function", "function": {"name": "now", "parameters": NOTHING}},
]
USER = {"role": "user", "content": "2+2"}


def tokenizer(template: str | None, *, special: tuple[str, ...] = ()) -> PreTrainedTokenizerFast:
    """Bytes, and the special tokens that are named."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({each: index for index, each in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(each, special=True) for each in ("<eos>", *special)])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<eos>", additional_special_tokens=list(special)
    )
    fast.chat_template = template
    return fast


def parser(template: str, *, special: tuple[str, ...] = ()) -> ToolCallParser:
    parser = ToolCallParser.of(tokenizer(template, special=special))
    assert parser is not None
    return parser


PARSERS = {
    "hermes": parser(HERMES),
    "llama": parser(LLAMA),
    "mistral": parser(MISTRAL),
    "mistral, hidden mark": parser(MISTRAL, special=("[TOOL_CALLS]",)),
    "hermes, hidden mark": parser(HERMES, special=("<tool_call>", "</tool_call>")),
}
CALLS = {
    "hermes": '<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": "é"}}\n</tool_call>',
    "llama": '{"name": "add", "parameters": {"a": 1, "b": "é"}}',
    "mistral": '[TOOL_CALLS][{"name": "add", "arguments": {"a": 1, "b": "é"}}]',
    "mistral, hidden mark": ' [{"name": "add", "arguments": {"a": 1, "b": "é"}}]',
    "hermes, hidden mark": '\n{"name": "add", "arguments": {"a": 1, "b": "é"}}\n',
}
ADD = ToolCall("add", '{"a": 1, "b": "é"}')


def test_the_form_is_known_from_the_template() -> None:
    assert [each.format for each in PARSERS.values()] == [
        ToolFormat.HERMES, ToolFormat.LLAMA, ToolFormat.MISTRAL, ToolFormat.MISTRAL, ToolFormat.HERMES
    ]  # fmt: skip
    assert [each.mark_id is not None for each in PARSERS.values()] == [False, False, False, True, True]
    for other in (NO_TOOLS, None, HERMES.replace("{%- if tools", "{# <function=f> #}{%- if tools")):
        assert ToolCallParser.of(tokenizer(other)) is None


@pytest.mark.parametrize("name", PARSERS)
def test_a_call_is_read(name: str) -> None:
    assert PARSERS[name].parse(CALLS[name]) == ("", [ADD])


def test_several_calls_and_text_before_them() -> None:
    twice = f"Let me see.\n\n{CALLS['hermes']}\n{CALLS['hermes']}"
    assert PARSERS["hermes"].parse(twice) == ("Let me see.", [ADD, ADD])
    assert PARSERS["llama"].parse(f"{CALLS['llama']}; {CALLS['llama']}") == ("", [ADD, ADD])
    assert PARSERS["llama"].parse(f"<|python_tag|>{CALLS['llama']}") == ("", [ADD])
    both = CALLS["mistral"][:-1] + ', {"name": "now", "arguments": {}}]'
    assert PARSERS["mistral"].parse(both) == ("", [ADD, ToolCall("now", "{}")])


@pytest.mark.parametrize(
    "text", ["", "plain", "{a} and b", "[1, 2]", "<tool_call>oops</tool_call>", '{"name": 1}', '{"a": 1}', "a < b\n "]
)  # fmt: skip
def test_what_only_looks_like_a_call_is_text(text: str) -> None:
    for each in PARSERS.values():
        assert each.parse(text) == (text, [])


@settings(max_examples=150)
@given(
    name=st.sampled_from(sorted(PARSERS)),
    pieces=st.lists(
        st.sampled_from(["Hi", " ", "\n", "<", "<tool", "[TOOL", "{", "[", "<tool_call>", "}", "CALL"]),
        max_size=6,
    ),
)
def test_streamed_text_is_a_beginning_of_the_whole(name: str, pieces: list[str]) -> None:
    whole = "".join(CALLS[name] if piece == "CALL" else piece for piece in pieces)
    content, _ = PARSERS[name].parse(whole)
    out = 0
    for end in range(len(whole) + 1):
        out = max(out, end - PARSERS[name].held_back(whole[:end]))
        assert content.startswith(whole[:out])


def test_ordinary_text_is_hardly_held_back() -> None:
    assert PARSERS["hermes"].held_back("Hello, <b>") == 0
    assert PARSERS["hermes"].held_back("Hello <tool") == len(" <tool")
    assert PARSERS["llama"].held_back("Hello {") == 0
    assert PARSERS["llama"].held_back(' {"name') == 7


def test_ids_are_what_every_template_takes() -> None:
    ids = {new_call_id() for _ in range(100)}
    assert len(ids) == 100 and all(len(each) == 9 and each.isalnum() for each in ids)


@pytest.mark.parametrize(
    "name", ["hermes", "llama", "mistral", "mistral, hidden mark", "hermes, hidden mark"]
)
@pytest.mark.parametrize(("choice", "parallel"), [(None, False), ("add", False), (None, True)])
async def test_an_answer_that_must_call_does(name: str, choice: str | None, parallel: bool) -> None:
    """A model of random scores, held to the constraint, writes what the parser reads."""
    import numpy as np

    template = {"hermes": HERMES, "llama": LLAMA}.get(name.split(",")[0], MISTRAL)
    special = {
        "mistral, hidden mark": ("[TOOL_CALLS]",),
        "hermes, hidden mark": ("<tool_call>", "</tool_call>"),
    }
    words = tokenizer(template, special=special.get(name, ()))
    wanted = PARSERS[name].constraint(TOOLS, name=choice, parallel=parallel)
    end = int(words.eos_token_id)
    constraints = Constraints(words, len(words), frozenset({end}))
    answer = await constraints.begin(Constraint(Language.GRAMMAR, wanted.grammar), [])
    rng, ids = np.random.default_rng(5), list[int]()
    while not answer.is_complete and len(ids) < 400:
        row = rng.normal(size=len(words)).astype(np.float32)
        ids.append(choose(row, Sampling(), len(ids), None, answer.allowed).token_id)
        if ids[-1] == end:
            break
        answer.consume(ids[-1:])
    content, calls = PARSERS[name].parse(words.decode(ids, skip_special_tokens=True))
    assert content == "" and calls
    for call in calls:
        assert call.name == choice or (choice is None and call.name in ("add", "now"))
        assert set(json.loads(call.arguments)) == ({"a", "b"} if call.name == "add" else set())


def test_a_tool_that_nobody_offers_cannot_be_chosen() -> None:
    with pytest.raises(InvalidRequest, match=r"tool_choice.function.name = 'sub' .*one of add, now"):
        PARSERS["hermes"].constraint(TOOLS, name="sub")


def text_of(template: str | None, messages: list[Any], tools: list[Any] | None = None) -> str:
    words = tokenizer(template)
    ids = asyncio.run(render(words, messages, tools or [], max_context_tokens=1000))
    return str(words.decode(ids))


def test_messages_calls_and_results_reach_the_template() -> None:
    called = {"role": "assistant", "content": None, "tool_calls": [
        {"id": "123456789", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}]}  # fmt: skip
    result = {"role": "tool", "tool_call_id": "123456789", "content": [{"type": "text", "text": "4"}]}
    text = text_of(HERMES, [USER, called, result], TOOLS)
    assert text.startswith('TOOLS{"type": "function"') and text.endswith("[tool]4[assistant]")
    assert '[user]2+2[assistant]<tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call>' in text


@pytest.mark.parametrize(
    ("template", "messages", "tools", "said"),
    [
        (None, [USER], [], "no chat template"),
        (NO_TOOLS, [USER], TOOLS, "knows no tools"),
        (NO_TOOLS, [USER, {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f"}}]}], [],
         "knows no calls of tools"),
        (NO_RESULTS, [USER, {"role": "tool", "content": "4"}], [], "refuses them: only user and assistant"),
        (HERMES, [{"role": "robot", "content": ""}], [], "messages.role = 'robot'"),
        (HERMES, [{"role": "user", "content": [{"type": "image_url"}]}], [], "the models read text only"),
        (HERMES, [USER], [{"type": "function", "function": {"name": "a b"}}], "tools.function.name = 'a b'"),
        (HERMES, [USER], [TOOLS[0], TOOLS[0]], "a name of its own"),
        (HERMES, [USER], [{"type": "web_search"}], "tools.type = 'web_search'"),
        (HERMES, [], [], "at least one"),
        (HERMES, [{"role": "user", "content": "x" * 64_001}], [], "at most 64000"),
    ],
)  # fmt: skip
def test_what_the_template_does_not_take_is_refused(
    template: str | None, messages: list[Any], tools: list[Any], said: str
) -> None:
    with pytest.raises(InvalidRequest, match=said):
        text_of(template, messages, tools)
