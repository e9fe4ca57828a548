"""Calls of tools in a model's text: which form a tokenizer's chat template teaches, reading it, and asking for it.

    HERMES    text <tool_call>{"name": "f", "arguments": {...}}</tool_call>     also Qwen; several calls in a row
    LLAMA     {"name": "f", "parameters": {...}}                                the whole answer; several with ; between
    MISTRAL   text [TOOL_CALLS][{"name": "f", "arguments": {...}}, ...]

Some vocabularies have a special token for the mark before a call, which text does not show: then the JSON that it
would stand before is what tells.
"""

from __future__ import annotations

import json
import re
import secrets
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Any

from fusionroute.errors import invalid
from fusionroute.v1 import router_pb2
from router_service.constraints import JSON_LAYOUT

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MAX_TOOLS = 128
_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")
_ID_CHARACTERS = string.ascii_letters + string.digits
_LLAMA_MARK = "<|python_tag|>"
_DECODER = json.JSONDecoder()


class ToolFormat(Enum):
    """How calls look in text; the value is the mark that stands before them."""

    HERMES = "<tool_call>"
    LLAMA = _LLAMA_MARK
    MISTRAL = "[TOOL_CALLS]"

    @property
    def arguments_key(self) -> str:
        """Under which a call's JSON holds its arguments."""
        return "parameters" if self is ToolFormat.LLAMA else "arguments"


@dataclass(frozen=True, slots=True)
class ToolCall:
    """One call.

    Attributes:
        name: of the tool.
        arguments: a JSON object, as text.
    """

    name: str
    arguments: str


def new_call_id() -> str:
    """An id for a call: nine letters or digits, since Mistral's templates take no other."""
    return "".join(secrets.choice(_ID_CHARACTERS) for _ in range(9))


@dataclass(frozen=True, slots=True)
class ToolCallParser:
    """Reads calls from the text of answers.

    Attributes:
        mark_id: the token of the mark, where the vocabulary has one that text does not show.
    """

    format: ToolFormat
    mark_id: int | None = None

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> ToolCallParser | None:
        """The parser for what a tokenizer's chat template teaches; None where it teaches no tools, or no known form."""
        format_ = _format_of(_template_of(tokenizer))
        if format_ is None:
            return None
        mark = format_.value
        is_hidden = mark in tokenizer.all_special_tokens
        return cls(format_, int(tokenizer.convert_tokens_to_ids(mark)) if is_hidden else None)

    def parse(self, text: str) -> tuple[str, list[ToolCall]]:
        """What an answer says besides its calls, and the calls. What only looks like a call is text."""
        start = self._start(text)
        calls = None if start is None else self._calls(text[start:])
        if not calls:
            return text, []
        return text[:start].rstrip(), calls

    def held_back(self, text: str) -> int:
        """How many characters at the end of an answer so far may turn out to be part of calls: those before are what
        `parse` will call text, whatever follows."""
        start = self._start(text)
        if start is None:
            start = len(text)
            if self._bare_opening is not None and not text.strip():
                return len(text)
            mark = self.format.value
            for length in range(min(len(mark) - 1, len(text)), 0, -1):
                if text.endswith(mark[:length]):
                    start -= length
                    break
        return len(text) - len(text[:start].rstrip())

    def constraint(
        self, tools: Sequence[Mapping[str, Any]], *, name: str | None = None, parallel: bool = False
    ) -> router_pb2.Constraint:
        """Answers that call one of the tools and say nothing else.

        Args:
            tools: as in a request to OpenAI's API; see `chat.checked_tools`.
            name: only this one.
            parallel: several calls may follow each other.

        Raises:
            InvalidRequest: no tool has that name.
        """
        functions = [tool["function"] for tool in tools]
        wanted = [each for each in functions if name is None or each["name"] == name]
        if not wanted:
            known = ", ".join(each["name"] for each in functions)
            raise invalid("tool_choice.function.name", name, f"one of {known}")
        rules = [self._rule(index, each) for index, each in enumerate(wanted)]
        one = " | ".join(f"call_{index}" for index in range(len(wanted)))
        mark = _quoted(self.format.value) if self.mark_id is None else f"<[{self.mark_id}]>"
        match self.format:
            case ToolFormat.HERMES if self.mark_id is None:
                start = _repeated(f'{mark} "\\n" ({one}) "\\n</tool_call>"', '"\\n"', parallel)
            case ToolFormat.HERMES:
                start = f'{mark} "\\n" ({one})'
            case ToolFormat.MISTRAL:
                calls = _repeated(f"({one})", '", "', parallel)
                start = f'{mark} "[" {calls} "]"'
            case ToolFormat.LLAMA:
                start = _repeated(f"({one})", '"; "', parallel)
        return router_pb2.Constraint(grammar="\n".join([f"start: {start}", *rules]))

    def _rule(self, index: int, function: Mapping[str, Any]) -> str:
        opening = f'{{"name": {json.dumps(function["name"])}, "{self.format.arguments_key}": '
        parameters = {"x-guidance": JSON_LAYOUT, "type": "object", **(function.get("parameters") or {})}
        return f'call_{index}: {_quoted(opening)} %json {json.dumps(parameters)} "}}"'

    # --- reading ---------------------------------------------------------------------------------------------------

    @property
    def _bare_opening(self) -> str | None:
        """With what a call may begin that has no mark."""
        if self.format is ToolFormat.LLAMA:
            return "{"
        if self.mark_id is None:
            return None
        return "[" if self.format is ToolFormat.MISTRAL else "{"

    def _start(self, text: str) -> int | None:
        """Where calls may begin."""
        opening = self._bare_opening
        stripped = text.lstrip()
        if opening is not None and stripped.startswith(opening):
            return len(text) - len(stripped)
        start = text.find(self.format.value)
        return None if start < 0 else start

    def _calls(self, text: str) -> list[ToolCall] | None:
        """The calls that a text consists of; None where it is no such text."""
        mark = self.format.value
        if self.format is ToolFormat.HERMES:
            pieces = text.split(mark) if mark in text else [text]
            bodies = [piece.split("</tool_call>")[0] for piece in pieces if piece.strip()]
            return self._read("\n".join(bodies))
        return self._read(text.removeprefix(mark))

    def _read(self, text: str) -> list[ToolCall] | None:
        """JSON values one after the other."""
        calls: list[ToolCall] = []
        place = 0
        while True:
            while place < len(text) and text[place] in " \t\r\n;":
                place += 1
            if place == len(text):
                return calls
            try:
                value, place = _DECODER.raw_decode(text, place)
            except (ValueError, RecursionError):
                return None
            for each in value if isinstance(value, list) else [value]:
                call = self._call(each)
                if call is None:
                    return None
                calls.append(call)

    def _call(self, value: Any) -> ToolCall | None:
        if not isinstance(value, dict) or not isinstance(value.get("name"), str):
            return None
        arguments = value.get(self.format.arguments_key, value.get("arguments", value.get("parameters", {})))
        if not isinstance(arguments, dict):
            return None
        return ToolCall(value["name"], json.dumps(arguments, ensure_ascii=False))


def is_tool_name(name: str) -> bool:
    """Whether a tool may be called that."""
    return _NAME.fullmatch(name) is not None


def _repeated(rule: str, separator: str, parallel: bool) -> str:
    """A rule once, or where calls may be parallel several times."""
    return f"{rule} ({separator} {rule})*" if parallel else rule


def _quoted(text: str) -> str:
    """As a string in a grammar."""
    return json.dumps(text)


def _template_of(tokenizer: PreTrainedTokenizerBase) -> str:
    """The template that is used where there are tools."""
    template: Any = tokenizer.chat_template
    if isinstance(template, dict):
        template = template.get("tool_use", template.get("default", ""))
    return template or ""


def _format_of(template: str) -> ToolFormat | None:
    if "tools" not in template:
        return None
    if ToolFormat.HERMES.value in template:
        return None if "<function=" in template or "<arg_key>" in template else ToolFormat.HERMES
    if ToolFormat.MISTRAL.value in template:
        return None if "[ARGS]" in template else ToolFormat.MISTRAL
    is_llama = re.search(r'\{\s*\\?"name\\?"', template) and re.search(r'\\?"parameters\\?"\s*:', template)
    return ToolFormat.LLAMA if is_llama else None
