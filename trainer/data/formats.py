"""What a row says, whatever format it came in: a text, a prompt with its completion, a conversation, or a pair.

    kind    fields                              meaning
    texts   text                                every token is a target
            prompt, completion                  strings, or both lists of messages
            messages                            a conversation; also ``conversations`` with from/value
    pairs   prompt, chosen, rejected            strings, or lists of messages
            chosen, rejected                    whole conversations; what both begin with is the prompt, which may
                                                be repeated as a string ``prompt``

Fields with other names are not looked at. Where several formats fit, messages win over prompt and completion, and
these over text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from trainer.data.problems import RowFault, shown

ROLES = ("system", "user", "assistant")
_OTHER_ROLE_NAMES = {"human": "user", "gpt": "assistant"}

Message = dict[str, str]


@dataclass(frozen=True, slots=True)
class PlainText:
    """A text without a prompt."""

    text: str


@dataclass(frozen=True, slots=True)
class Completion:
    """A prompt and what shall follow it.

    Attributes:
        ended: False for an answer that was cut off, which therefore has no end to be learnt.
    """

    prompt: str
    completion: str
    ended: bool = True


@dataclass(frozen=True, slots=True)
class Conversation:
    """Messages; those of the assistant from index `num_prompt` on are to be learnt.

    Attributes:
        messages: each with ``role`` and ``content``; the last one is the assistant's.
        num_prompt: messages that belong to the prompt.
        ended: False when the last message was cut off.
    """

    messages: tuple[Message, ...]
    num_prompt: int = 0
    ended: bool = True


Answered = PlainText | Completion | Conversation


@dataclass(frozen=True, slots=True)
class Pair:
    """Two answers to one prompt, both Completions or both Conversations."""

    chosen: Completion | Conversation
    rejected: Completion | Conversation


@dataclass(frozen=True, slots=True)
class Question:
    """A prompt, text or messages, and the right answer."""

    prompt: str | tuple[Message, ...]
    gold: str


def read_text(content: Mapping[str, Any]) -> Answered:
    """A row of texts. Raises RowFault."""
    for field in ("messages", "conversations"):
        if content.get(field) is not None:
            return _whole_conversation(_messages(content[field], field), field)
    if content.get("completion") is not None:
        return _answer(content, "completion")
    if content.get("text") is not None:
        return PlainText(_text(content["text"], "text"))
    if content.get("chosen") is not None:
        raise RowFault("", "a row of pairs (chosen, rejected) among texts")
    if content.get("prompt") is not None:
        raise RowFault("completion", "missing beside `prompt`")
    raise RowFault("", f"none of messages, prompt + completion, text; it has {shown(sorted(content))}")


def read_pair(content: Mapping[str, Any]) -> Pair:
    """A row of pairs. Raises RowFault, also where both answers are the same."""
    for field in ("chosen", "rejected"):
        if content.get(field) is None:
            raise RowFault(field, f"missing; the row has {shown(sorted(content))}")
    if _is_list(content["chosen"]) != _is_list(content["rejected"]):
        raise RowFault(
            "rejected", "`chosen` and `rejected` must both be strings or both be lists of messages"
        )
    prompt = content.get("prompt")
    if _is_list(content["chosen"]) and not _is_list(prompt):
        chosen, rejected = _implicit_pair(content)
        _check_repeated_prompt(prompt, chosen)
        pair = Pair(chosen, rejected)
    elif prompt is None:
        raise RowFault("prompt", "missing; only lists of messages may do without it")
    else:
        pair = Pair(_answer(content, "chosen"), _answer(content, "rejected"))
    if _said(pair.chosen) == _said(pair.rejected):
        raise RowFault("rejected", "equal to `chosen`: nothing can be preferred")
    return pair


def read_question(content: Mapping[str, Any]) -> Question:
    """A prompt with its gold answer: a row of texts that has a prompt, or ``chosen`` of a pair. Raises RowFault."""
    row = _answer(content, "chosen") if content.get("chosen") is not None else read_text(content)
    match row:
        case PlainText():
            raise RowFault("text", "a text has no prompt; give prompt + completion, messages, or a pair")
        case Completion(prompt, completion):
            return Question(prompt, completion)
        case Conversation(messages, num_prompt):
            if num_prompt and len(messages) > num_prompt + 1:
                raise RowFault("completion", f"{len(messages) - num_prompt} messages; a gold answer is one")
            return Question(messages[:-1], messages[-1]["content"])


def _answer(content: Mapping[str, Any], field: str) -> Completion | Conversation:
    prompt, answer = content.get("prompt"), content[field]
    if prompt is None:
        raise RowFault("prompt", f"missing beside `{field}`")
    if _is_list(prompt) != _is_list(answer):
        raise RowFault(field, f"`prompt` and `{field}` must both be strings or both be lists of messages")
    ended = _ended(content, field)
    if not _is_list(prompt):
        return Completion(_text(prompt, "prompt"), _text(answer, field), ended)
    asked, said = _messages(prompt, "prompt"), _messages(answer, field)
    if asked[-1]["role"] == "assistant":
        raise RowFault(f"prompt[{len(asked) - 1}].role", "'assistant' cannot end a prompt")
    if said[0]["role"] != "assistant" or said[-1]["role"] != "assistant":
        raise RowFault(field, "must begin and end with a message of the assistant")
    _check_learnt(said, field)
    return Conversation((*asked, *said), len(asked), ended)


def _implicit_pair(content: Mapping[str, Any]) -> tuple[Conversation, Conversation]:
    """Two conversations; the prompt is what both begin with, up to the message before an assistant's."""
    chosen, rejected = _messages(content["chosen"], "chosen"), _messages(content["rejected"], "rejected")
    num_shared = 0
    for mine, other in zip(chosen, rejected, strict=False):
        if mine != other:
            break
        num_shared += 1
    if num_shared == len(chosen) == len(rejected):
        raise RowFault("rejected", "equal to `chosen`: nothing can be preferred")
    while num_shared and chosen[num_shared - 1]["role"] == "assistant":
        num_shared -= 1
    if not num_shared:
        raise RowFault("chosen", "`chosen` and `rejected` share no message that could be their prompt")
    for field, messages in (("chosen", chosen), ("rejected", rejected)):
        rest = messages[num_shared:]
        if not rest or rest[0]["role"] != "assistant" or rest[-1]["role"] != "assistant":
            raise RowFault(
                field, "after the shared prompt must begin and end with a message of the assistant"
            )
        _check_learnt(messages, field, num_shared)
    return (
        Conversation(tuple(chosen), num_shared, _ended(content, "chosen")),
        Conversation(tuple(rejected), num_shared, _ended(content, "rejected")),
    )


def _check_repeated_prompt(prompt: object, chosen: Conversation) -> None:
    """Some data sets repeat the question as a string beside conversations that hold it already."""
    asked = {message["content"].strip() for message in chosen.messages[: chosen.num_prompt]}
    if prompt is not None and not (isinstance(prompt, str) and prompt.strip() in asked):
        raise RowFault(
            "prompt", f"{shown(prompt)} is none of the messages that `chosen` and `rejected` share"
        )


def _whole_conversation(messages: list[Message], field: str) -> Conversation:
    """Up to the last message of the assistant: what follows it can teach nothing."""
    places = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    if not places:
        raise RowFault(field, "no message of the assistant: nothing to learn")
    if places[0] == 0:
        raise RowFault(f"{field}[0].role", "'assistant' cannot begin a conversation")
    _check_learnt(messages, field)
    return Conversation(tuple(messages[: places[-1] + 1]))


def _messages(value: Any, field: str) -> list[Message]:
    if not _is_list(value):
        raise RowFault(field, f"{shown(value)} is not a list of messages")
    if not value:
        raise RowFault(field, "an empty list of messages")
    return [_message(message, f"{field}[{index}]") for index, message in enumerate(value)]


def _check_learnt(messages: Sequence[Message], field: str, skipped: int = 0) -> None:
    """Answers that are to be learnt must say something; those within a prompt need not."""
    for index, message in enumerate(messages):
        if index >= skipped and message["role"] == "assistant" and not message["content"].strip():
            raise RowFault(f"{field}[{index}].content", f"{shown(message['content'])} is empty")


def _message(value: Any, field: str) -> Message:
    if not isinstance(value, Mapping):
        raise RowFault(field, f"{shown(value)} is not a message with `role` and `content`")
    role, content = value.get("role", value.get("from")), value.get("content", value.get("value"))
    if role is None:
        raise RowFault(f"{field}.role", "missing")
    known = _OTHER_ROLE_NAMES.get(role, role) if isinstance(role, str) else role
    if known not in ROLES:
        raise RowFault(f"{field}.role", f"{shown(role)} is not one of {', '.join(ROLES)}")
    if content is None:
        raise RowFault(f"{field}.content", "missing")
    return {"role": known, "content": _text(content, f"{field}.content", may_be_empty=True)}


def _text(value: Any, field: str, *, may_be_empty: bool = False) -> str:
    if not isinstance(value, str):
        raise RowFault(field, f"{shown(value)} is not text")
    if not value.strip() and not may_be_empty:
        raise RowFault(field, f"{shown(value)} is empty")
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise RowFault(field, f"half of a surrogate pair at character {error.start}") from None
    return value


def _ended(content: Mapping[str, Any], field: str) -> bool:
    """``chosen_ended`` and so on: False for an answer that was cut off by its length."""
    value = content.get(f"{field}_ended")
    if value is not None and not isinstance(value, bool):
        raise RowFault(f"{field}_ended", f"{shown(value)} is neither true nor false")
    return value is not False


def _said(answer: Completion | Conversation) -> tuple[object, bool]:
    if isinstance(answer, Completion):
        return answer.completion, answer.ended
    return answer.messages, answer.ended


def _is_list(value: object) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, (str, bytes))
